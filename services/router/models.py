"""The served models as the router knows them: tokeniser, defaults and what they are sold as."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from services.router.config import ModelConfig
from tidemill.billing import PriceBook
from tidemill.errors import ModelNotFound
from tidemill.text import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model by its served name."""

    config: ModelConfig
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        """Name that clients ask for."""
        return self.config.name


class Catalogue:
    """The models this router serves, in order of name."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._models = {model.name: model for model in sorted(models, key=lambda each: each.name)}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def get(self, name: str) -> ServedModel:
        """The model of that name; ModelNotFound names those that there are."""
        if name not in self._models:
            raise ModelNotFound(
                f"no model {name!r} is served here", metadata={"models": ",".join(self._models)}
            )
        return self._models[name]


def load_model(config: ModelConfig, book: PriceBook, now_ms: int) -> ServedModel:
    """Read the model's folder; ConfigError if the price book has no price for it now."""
    book.tariff_at(config.price_model, now_ms).window_at(now_ms)
    return ServedModel(config, Tokenizer.load(config.path))
