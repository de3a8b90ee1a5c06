"""How a line of a table of tiles is tuned, whatever the device, the clock and the kernel are."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.kernels import tile_lines
from benchmarks.kernels.arms import Case, Inputs, Subject, plain
from benchmarks.kernels.harness import Call
from tidemill.kernels import tiles
from tidemill.kernels.device import H100, DeviceClass

MARGIN = 0.02  # that an arm must be faster by, twice
SECOND_TIMINGS = 3  # arms of a line that are timed again, at the most


@dataclass(frozen=True)
class Line:
    """One line of a table, and what it serves."""

    most_rows: int | None  # None: the table's last
    tile: Any
    arms: Sequence[Any]
    cases: Sequence[Case]

    @property
    def name(self) -> str:
        return "above" if self.most_rows is None else str(self.most_rows)


@dataclass(frozen=True)
class Bench:
    """What a GPU does here."""

    time_us: Callable[[Sequence[Call]], float]  # of one of the calls, in turn
    # Each arm's first calls -> why it can not be, of those that can not.
    refusals: Callable[[Sequence[tuple[Any, Sequence[Call]]]], Mapping[Any, str]]
    num_sets: Callable[[int], int]  # of inputs, for a call that reads so many bytes
    settle: Callable[[], None]  # raises if the device is broken


@dataclass
class Notes:
    """What is known of a table's lines; written after every arm, so that a crash loses none."""

    path: Path
    lines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def line(self, line: Line) -> dict[str, Any]:
        """The line's; begun anew if the file has another tile than what was tried, or found."""
        found = self.lines.get(line.name)
        if found is None or asdict(line.tile) not in (found["before"], found.get("after")):
            found = self.lines[line.name] = {"before": asdict(line.tile), "arms": []}
        return found

    def save(self) -> None:
        """At once: who reads finds all of it, or what was there before."""
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(self.lines), encoding="utf-8")
        draft.replace(self.path)

    @classmethod
    def read(cls, path: Path) -> "Notes":
        """What the file says; nothing is known where there is none."""
        return cls(path, json.loads(path.read_text("utf-8")) if path.exists() else {})

    @property
    def trying(self) -> tuple[str, dict[str, Any]] | None:
        """Line and tile of the arm that was being timed when the notes were saved."""
        found = ((name, line["trying"]) for name, line in self.lines.items() if "trying" in line)
        return next(found, None)

    def give_up(self, why: str) -> None:
        """Drop the arm that was being timed, for that reason; without one it is as if untried."""
        for line in self.lines.values():
            tile = line.pop("trying", None)
            if tile and why:
                line["arms"].append({"tile": tile, "dropped": why})
        self.save()


def lines_of(subject: Subject, device: DeviceClass, folder: Path = tiles.FOLDER) -> list[Line]:
    """The table's lines that any case of the subject falls on."""
    tables: Mapping[DeviceClass, tiles.Classes[Any]] = tiles.tables_of(
        subject.table, subject.form, folder
    )
    classes = tables.get(device, tables[H100])
    found, below = [], 0
    for most, tile in classes:
        cases = [case for case in subject.cases if below < case.rows <= most]
        below = most
        if cases:
            arms = list(dict.fromkeys(subject.arms(tile)))
            found.append(Line(None if most == tiles.MOST else most, tile, arms, cases))
    return found


def tune_line(line: Line, bench: Bench, notes: Notes, is_over: Callable[[], bool]) -> bool:
    """Times what is not yet known of the line, and decides; False if time is over before."""
    found = notes.line(line)
    if "after" in found:
        return True
    if is_over():
        return False
    stand = Stand(line, bench)
    known = [arm["tile"] for arm in found["arms"]]
    todo = [tile for tile in (line.tile, *line.arms) if asdict(tile) not in known]
    refused = bench.refusals([(tile, stand.first_calls(tile)) for tile in todo])
    for tile in todo:
        if is_over():
            return False
        found["trying"] = asdict(tile)
        notes.save()
        told = {"dropped": refused[tile]} if tile in refused else stand.try_arm(tile)
        found["arms"].append({"tile": found.pop("trying"), **told})
        notes.save()
        if "dropped" in told:
            bench.settle()
    decide(line, found, stand)
    notes.save()
    return True


class Stand:
    """A line's inputs and truths, made once for all its arms."""

    def __init__(self, line: Line, bench: Bench) -> None:
        self._bench = bench
        self._cases = [
            (case, [case.inputs(seed) for seed in range(bench.num_sets(case.num_bytes))])
            for case in line.cases
        ]
        self._truths = [plain(case.truth(*sets[0][0], **sets[0][1])) for case, sets in self._cases]

    def first_calls(self, tile: Any) -> list[Call]:
        return [_call(case, sets[0], tile) for case, sets in self._cases]

    def try_arm(self, tile: Any) -> dict[str, Any]:
        """us of each case, or why the arm is dropped."""
        try:
            for (case, _), call, truth in zip(
                self._cases, self.first_calls(tile), self._truths, strict=True
            ):
                off = worst_row(plain(call()), truth)
                if not off <= case.tolerance:  # NaN too
                    return {"dropped": f"{case.name}: off by {off:.3g} of a row"}
            return {"us": self.times(tile)}
        except Exception as error:  # whatever a tile does to a kernel is the finding
            return {"dropped": f"{type(error).__name__}: {error}"[:300]}

    def times(self, tile: Any) -> dict[str, float]:
        """us of each case."""
        return {
            case.name: round(self._bench.time_us([_call(case, each, tile) for each in sets]), 3)
            for case, sets in self._cases
        }


def _call(case: Case, inputs: Inputs, tile: Any) -> Call:
    args, settings = inputs
    return lambda: case.kernel(*args, **settings, tile=tile)


def worst_row(found: Tensor, truth: Tensor) -> float:
    """The greatest norm of a row's difference, over the norm of the rows as they are on average."""
    if found.shape != truth.shape:
        return math.inf
    off = (found.double() - truth.double()).norm(dim=-1).max()
    usual = truth.double().norm(dim=-1).square().mean().sqrt()
    return float(off / usual.clamp(min=1e-30))


def decide(line: Line, found: dict[str, Any], stand: Stand) -> None:
    """Notes the line's tile from now on, and both second timings where another was tried."""
    us = {index: mean_us(arm["us"]) for index, arm in enumerate(found["arms"]) if "us" in arm}
    before = next((us[index] for index in us if found["arms"][index]["tile"] == found["before"]),
                  math.inf)  # fmt: skip
    found |= {"after": found["before"], "before_us": before, "us": before, "again": []}
    for index in sorted(us, key=us.__getitem__)[:SECOND_TIMINGS]:
        if us[index] >= (1 - MARGIN) * before:
            return
        tile = type(line.tile)(**found["arms"][index]["tile"])
        old = mean_us(stand.times(line.tile)) if before < math.inf else math.inf
        new = mean_us(stand.times(tile))
        found["again"].append({"tile": asdict(tile), "us": new, "before_us": old})
        if new < (1 - MARGIN) * old:
            found |= {"after": asdict(tile), "us": new, "before_us": old}
            return


def mean_us(us: Mapping[str, float]) -> float:
    """The geometric mean: each case weighs alike, whatever its size."""
    return round(math.exp(sum(map(math.log, us.values())) / len(us)), 3)


def adopt(text: str, subject: Subject, lines: Mapping[str, Mapping[str, Any]], origin: str) -> str:
    """The file of tiles with every decided line rewritten; `origin` goes behind each."""
    for name, found in lines.items():
        if "after" not in found or found["us"] == math.inf:
            continue
        most_rows = None if name == "above" else int(name)
        timed = sum("us" in arm for arm in found["arms"])
        change = f"the fastest of {timed}"
        if found["after"] != found["before"]:
            change = f"{found['before_us']} before" if found["before_us"] < math.inf else "alone"
        note = f"{found['us']} us, {change}; {origin}"
        tile = subject.form(**found["after"])
        text = tile_lines.rewrite(text, subject.table, most_rows, tile, note)
    return text
