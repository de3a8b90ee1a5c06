"""Build the corpus: read, deduplicate, split by module, write train.jsonl and heldout.jsonl.

Each line is {"unit", "kind": "text", "text"} or {"unit", "kind": "chat", "system", "question",
"thinking", "answer"}.
"""

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from training.chat import make_chat
from training.docstrings import read_docstrings
from training.pages import Page, read_pages

SPLIT_SEED = "estuary"
HELD_OUT_PER_MILLE = 40
MIN_DEDUPED_CHARS = 60
MIN_DOCUMENT_CHARS = 200
Record = dict[str, str]


def is_held_out(unit: str) -> bool:
    """Decided by the module's name alone, so that a page and its docstrings fall together."""
    digest = hashlib.sha256(f"{SPLIT_SEED}:{unit}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE


class Deduplicator:
    """Drops every long block that was let through before, whatever its white space and case."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def unseen(self, blocks: Iterable[str]) -> list[str]:
        return [block for block in blocks if self._is_new(block)]

    def _is_new(self, block: str) -> bool:
        normal = " ".join(block.lower().split())
        if len(normal) < MIN_DEDUPED_CHARS:
            return True
        digest = hashlib.sha256(normal.encode()).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True


def records(pages: Iterable[Page], dedupe: Deduplicator) -> Iterator[Record]:
    asked: set[str] = set()
    for page in pages:
        text = "\n\n".join(dedupe.unseen(page.blocks))
        if len(text) >= MIN_DOCUMENT_CHARS:
            yield {"unit": page.unit, "kind": "text", "text": text}
        for described in page.objects:
            chat = make_chat(described)
            if chat is not None and described.name not in asked:
                asked.add(described.name)
                yield {"unit": page.unit, "kind": "chat", **asdict(chat)}


def build(docs: Path, library: Path, out: Path) -> None:
    pages = list(itertools.chain(read_pages(docs), read_docstrings(library)))
    out.mkdir(parents=True, exist_ok=True)
    dedupe = Deduplicator()
    # Held out goes first: a block that stands in both parts is then missing from train.
    for name, held_out in (("heldout", True), ("train", False)):
        part = [page for page in pages if is_held_out(page.unit) is held_out]
        lines = [json.dumps(record) + "\n" for record in records(part, dedupe)]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        units = sorted({page.unit for page in part})
        size = sum(map(len, lines))
        print(f"{name}: {len(units)} units, {len(lines)} records, {size} characters")
        if held_out:
            print("held out:", ", ".join(units))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path("/usr/share/doc/python3.11/html"))
    parser.add_argument("--library", type=Path, default=Path("/usr/lib/python3.11"))
    parser.add_argument("--out", type=Path, default=Path("training/build"))
    args = parser.parse_args()
    build(args.docs, args.library, args.out)


if __name__ == "__main__":
    main()
