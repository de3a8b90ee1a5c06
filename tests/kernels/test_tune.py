"""The tuner without a GPU: what it chooses, what it drops, and what it writes."""

import json
import math
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import sglang_config, tile_lines, tune
from benchmarks.kernels.arms import Case, Inputs, Subject, about, subjects
from benchmarks.kernels.harness import Call
from benchmarks.kernels.tuning import Bench, Line, Notes, adopt, lines_of, tune_line, worst_row
from tests.kernels.test_fp8_gemm import operands
from tidemill.kernels import tiles
from tidemill.kernels.cases import GemmCase
from tidemill.kernels.device import H100, DeviceClass
from tidemill.kernels.fp8_gemm import configs, reference

ORIGIN = "H100, 8dd2280, 2026-11-22"
H200 = DeviceClass((9, 0), 132, 4)


@dataclass(frozen=True)
class Form:
    width: int
    fast: bool = False


class Gpu:
    """Tells what a tile takes by `us`: a number, several in turn, or what a call with it raises."""

    def __init__(self, us: Mapping[Any, Any], refused: Mapping[Any, str] | None = None) -> None:
        self.us = {tile: list(each) if isinstance(each, tuple) else each
                   for tile, each in us.items()}  # fmt: skip
        self.refused = refused or {}
        self.timed: list[Any] = []
        self.settled = 0

    def bench(self) -> Bench:
        return Bench(self._time_us, lambda _: self.refused, lambda _: 2, self._settle)

    def kernel(self, rows: Tensor, *, tile: Any) -> Tensor:
        self.current = tile
        told = self.us[tile]
        if isinstance(told, Exception):
            raise told
        return told if isinstance(told, Tensor) else rows * 2

    def _time_us(self, calls: Sequence[Call]) -> float:
        assert len(calls) == 2  # sets of inputs
        calls[0]()
        self.timed.append(self.current)
        told = self.us[self.current]
        return float(told.pop(0) if len(told) > 1 else told[0]) if isinstance(told, list) else told

    def _settle(self) -> None:
        self.settled += 1


def inputs(seed: int) -> Inputs:
    return (torch.full((3, 4), float(seed + 1)),), {}


def double(rows: Tensor) -> Tensor:
    return rows * 2


def line_on(gpu: Gpu, cases: Sequence[str] = ("one",)) -> Line:
    """The file's tile is the first that the GPU knows, the others are arms."""
    tile, *arms = gpu.us
    made = [Case(name, 1, 1, inputs, gpu.kernel, double) for name in cases]
    return Line(16, tile, arms, made)


def tuned(gpu: Gpu, folder: Path, **settings: Any) -> dict[str, Any]:
    notes = Notes(folder / "notes.json")
    tune_line(line_on(gpu, **settings), gpu.bench(), notes, lambda: False)
    return Notes.read(notes.path).lines["16"]


OLD, NEW, OTHER = Form(1), Form(2), Form(3)


@pytest.mark.parametrize(
    ("old", "new", "chosen"),
    [
        (100.0, 50.0, NEW),
        (100.0, 97.0, NEW),
        (100.0, 98.5, OLD),  # within 2 %
        (100.0, 120.0, OLD),
        (100.0, (90.0, 99.0), OLD),  # the second timing says otherwise
        ((100.0, 91.0), 90.0, OLD),
    ],
)
def test_arm_replaces_the_tile_only_if_it_is_faster_twice(
    tmp_path: Path, old: float, new: float, chosen: Form
) -> None:
    assert tuned(Gpu({OLD: old, NEW: new}), tmp_path)["after"] == asdict(chosen)


def test_arm_that_is_hardly_faster_is_not_timed_again(tmp_path: Path) -> None:
    assert tuned(Gpu({OLD: 100.0, NEW: 98.5}), tmp_path)["again"] == []


def test_arm_is_on_record_before_it_is_called(tmp_path: Path) -> None:
    """What breaks the process, or hangs, is then known."""
    path = tmp_path / "notes.json"
    gpu = Gpu({OLD: 100.0})
    found = []

    def kernel(rows: Tensor, *, tile: Any) -> Tensor:
        found.append(Notes.read(path).trying)
        return gpu.kernel(rows, tile=tile)

    line = line_on(gpu)
    watched = replace(line, cases=[replace(line.cases[0], kernel=kernel)])
    tune_line(watched, gpu.bench(), Notes(path), lambda: False)
    assert found[0] == ("16", asdict(OLD))
    assert Notes.read(path).trying is None


def test_next_arm_is_tried_where_the_fastest_was_so_only_once(tmp_path: Path) -> None:
    found = tuned(Gpu({OLD: 100.0, NEW: (50.0, 110.0), OTHER: 80.0}), tmp_path)
    assert found["after"] == asdict(OTHER)
    assert [each["us"] for each in found["again"]] == [110.0, 80.0]


def test_cases_weigh_alike_whatever_their_size(tmp_path: Path) -> None:
    """Twice as fast on the small one outweighs a tenth more on the large one."""
    us = {OLD: (1.0, 1000.0), NEW: (0.5, 1100.0, 0.5, 1100.0)}
    found = tuned(Gpu({**us, OLD: (1.0, 1000.0, 1.0, 1000.0)}), tmp_path, cases=("small", "large"))
    assert found["after"] == asdict(NEW)
    assert found["us"] == pytest.approx(math.sqrt(550), abs=1e-3)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (RuntimeError("out of resource"), "RuntimeError: out of resource"),
        (torch.full((3, 4), 2.1), "one: off by"),
        (torch.full((3, 4), float("nan")), "one: off by nan"),
        (torch.full((3, 5), 2.0), "one: off by inf"),
    ],
)
def test_arm_that_fails_or_is_wrong_is_dropped_with_the_reason(
    tmp_path: Path, told: Any, why: str
) -> None:
    gpu = Gpu({OLD: 100.0, NEW: told, OTHER: 50.0})
    found = tuned(gpu, tmp_path)
    assert found["after"] == asdict(OTHER)
    assert found["arms"][1]["dropped"].startswith(why)
    assert gpu.settled == 1


def test_a_single_wrong_row_is_enough() -> None:
    truth = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    wrong = truth.clone()
    wrong[77] = 0
    assert worst_row(wrong, truth) > 0.5
    assert worst_row(truth.bfloat16(), truth) < 0.01


def test_arm_that_would_spill_is_never_called(tmp_path: Path) -> None:
    gpu = Gpu({OLD: 100.0, NEW: 1.0}, refused={NEW: "spills 16 bytes a thread"})
    found = tuned(gpu, tmp_path)
    assert found["arms"][1] == {"tile": asdict(NEW), "dropped": "spills 16 bytes a thread"}
    assert NEW not in gpu.timed
    assert found["after"] == asdict(OLD)


def test_tile_that_fails_itself_gives_way_to_the_best_arm(tmp_path: Path) -> None:
    found = tuned(Gpu({OLD: RuntimeError("no"), NEW: 9.0, OTHER: 7.0}), tmp_path)
    assert found["after"] == asdict(OTHER)


def test_line_of_which_nothing_works_stays_as_it_is(tmp_path: Path) -> None:
    found = tuned(Gpu({OLD: RuntimeError("no"), NEW: RuntimeError("nor this")}), tmp_path)
    assert found["after"] == asdict(OLD)
    assert adopt("untouched", Subject("op", Form, (), list), {"16": found}, "") == "untouched"


def test_run_that_was_cut_off_is_taken_up_where_it_was(tmp_path: Path) -> None:
    gpu = Gpu({OLD: 100.0, NEW: 50.0, OTHER: 60.0})
    path = tmp_path / "notes.json"
    over = iter([False, False, False, True])
    assert not tune_line(line_on(gpu), gpu.bench(), Notes(path), lambda: next(over))
    assert gpu.timed == [OLD, NEW]
    assert tune_line(line_on(gpu), gpu.bench(), Notes.read(path), lambda: False)
    assert gpu.timed == [OLD, NEW, OTHER, OLD, NEW]
    assert tune_line(line_on(gpu), gpu.bench(), Notes.read(path), lambda: False)
    assert len(gpu.timed) == 5


def test_line_is_tuned_anew_where_the_file_has_another_tile(tmp_path: Path) -> None:
    gpu = Gpu({OLD: 100.0, NEW: 50.0})
    notes = Notes(tmp_path / "notes.json")
    tune_line(line_on(gpu), gpu.bench(), notes, lambda: False)
    adopted = replace(line_on(gpu), tile=NEW)
    gpu.timed.clear()
    tune_line(adopted, gpu.bench(), notes, lambda: False)
    assert gpu.timed == []
    tune_line(replace(adopted, tile=OTHER, arms=()), Gpu({OTHER: 1.0}).bench(), notes, lambda: True)
    assert notes.lines["16"]["before"] == asdict(OTHER)


TEXT = """# H100.
# About all of them.

op = [
  # Why this one.
  { most_rows = 16, width = 1 },
  { width = 3, fast = true },  # 3 us
]
other = [
  { most_rows = 4, width = 1 },
  { width = 1 },
]
"""


def test_line_that_was_timed_is_written_and_all_else_stays(tmp_path: Path) -> None:
    found = tuned(Gpu({OLD: 100.0, NEW: 50.0}), tmp_path)
    text = adopt(TEXT, Subject("op", Form, (), list), {"16": found}, ORIGIN)
    written = "  { most_rows = 16, width = 2 },  # 50.0 us, 100.0 before; " + ORIGIN
    assert text == TEXT.replace("  { most_rows = 16, width = 1 },", written, 1)
    tiles.path_of(H100, tmp_path).write_text(text)
    tables = tiles.tables_of("op", Form, tmp_path)
    assert tables == {H100: ((16, Form(2)), (tiles.MOST, Form(3, fast=True)))}


def test_last_line_and_a_tile_that_stays_say_so_too() -> None:
    found = {"before": asdict(NEW), "after": asdict(NEW), "us": 7.5, "before_us": 7.5,
             "arms": [{"us": {}}, {"us": {}}, {"dropped": "no"}]}  # fmt: skip
    text = adopt(TEXT, Subject("op", Form, (), list), {"above": found}, ORIGIN)
    assert f"  {{ width = 2 }},  # 7.5 us, the fastest of 2; {ORIGIN}\n]\nother" in text


def test_table_or_line_that_is_not_there_is_told() -> None:
    with pytest.raises(LookupError, match="op has no line of its own for most_rows = 4"):
        tile_lines.rewrite(TEXT, "op", 4, OLD, "")
    with pytest.raises(LookupError, match="third has no line"):
        tile_lines.rewrite(TEXT, "third", None, OLD, "")


def test_new_device_class_has_a_file_of_its_own(tmp_path: Path) -> None:
    text = tile_lines.for_device(TEXT, H200, "NVIDIA H200")
    head = "# Compute capability 9.0, 132 multiprocessors, 4 TB/s: NVIDIA H200.\n"
    assert text == head + TEXT.partition("\n")[2]


def test_what_is_written_is_what_is_compiled_ahead_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tidemill.kernels.fp8_gemm import kernel  # noqa: PLC0415 - triton is heavy

    text = tiles.path_of(H100).read_text(encoding="utf-8")
    tile = configs.Tile(64, 256, 128, tma=True, stages=2)
    written = tile_lines.rewrite(text, "fp8_gemm", 128, tile, ORIGIN)
    tiles.path_of(H100, tmp_path).write_text(written)
    monkeypatch.setattr(kernel, "TILES", tiles.tables_of("fp8_gemm", configs.Tile, tmp_path))
    assert any(
        (variant.constants.get("BLOCK_N"), variant.num_stages) == (256, 2)
        for variant in kernel.variants()
    )


@pytest.mark.parametrize("subject", subjects().values(), ids=lambda subject: subject.table)
def test_every_line_of_a_table_has_cases_and_a_bounded_number_of_arms(subject: Subject) -> None:
    lines = lines_of(subject, H100)
    assert len(lines) == len(tiles.tables_of(subject.table, subject.form)[H100])
    assert sum(len(line.cases) for line in lines) == len(subject.cases)
    for line in lines:
        assert line.cases
        assert 1 <= len(line.arms) <= 24
        assert line.tile not in line.arms
        assert len(set(line.arms)) == len(line.arms)
        assert all(isinstance(arm, subject.form) for arm in line.arms)


def test_every_table_but_those_of_the_interpreter_can_be_tuned() -> None:
    content = tomllib.loads(tiles.path_of(H100).read_text("utf-8"))
    assert {*subjects()} == {name for name in content if not name.endswith("fp32")}


def test_few_tokens_try_each_split_of_k() -> None:
    line = lines_of(subjects()["gate_up_fp8"], H100)[0]
    assert "T=1" in {case.name for case in line.cases}
    assert {arm.splits for arm in line.arms} >= {1, 2, 4, 8}


def test_the_kernel_itself_is_tuned_and_one_that_errs_never_wins(tmp_path: Path) -> None:
    """In the interpreter: every arm computes what the reference does, but the one made to err."""
    from tidemill.kernels.fp8_gemm import kernel  # noqa: PLC0415 - triton is heavy

    tile = configs.Tile(16, 64, 128, swap=True)
    arms = about(tile, {"columns": (128,), "splits": (2, 3), "stages": (5,)})
    asked: list[configs.Tile] = []

    def erring(*args: Any, tile: configs.Tile, **settings: Any) -> Tensor:
        asked.append(tile)
        out = kernel.fp8_gemm(*args, **settings, tile=tile)
        return out * 1.05 if tile.splits == 3 else out

    settings = {"out_dtype": torch.float32, "residual": None, "bias": None}
    case = Case(
        "M=20", 20, 1, lambda _: (operands(GemmCase(20, 200, 384)), settings),
        erring, reference.fp8_gemm,
    )  # fmt: skip
    us = {replace(tile, splits=3): 1.0, replace(tile, splits=2): 2.0}

    def time_us(calls: Sequence[Call]) -> float:
        calls[0]()
        return us.get(asked[-1], 10.0)

    bench = Bench(time_us, lambda _: {}, lambda _: 1, lambda: None)
    notes = Notes(tmp_path / "notes.json")
    tune_line(Line(None, tile, arms, [case]), bench, notes, lambda: False)
    found = notes.lines["above"]
    dropped = [arm["tile"]["splits"] for arm in found["arms"] if "dropped" in arm]
    assert dropped == [3]
    assert found["after"]["splits"] == 2


def process(script: str, path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float = 20) -> str:
    """`script` as a table's process: `lines` are the notes' and `tell()` writes them."""
    monkeypatch.setattr(tune, "PATIENCE", 1.0)
    head = (
        "import json, os, sys, time; from pathlib import Path; path = Path(sys.argv[1])\n"
        "lines = json.loads(path.read_text()) if path.exists() else {'16': {'arms': []}}\n"
        "tell = lambda: path.write_text(json.dumps(lines))\n"
    )
    return tune.supervise(
        [sys.executable, "-c", head + script, str(path)], path, path.with_name("log"), seconds
    )


TRIES = """
for tile in ({'width': 1}, {'width': 2}):
    if tile in [arm['tile'] for arm in lines['16']['arms']]: continue
    lines['16']['trying'] = tile; tell()
    if tile['width'] == 1: BREAK
    lines['16']['arms'].append({'tile': lines['16'].pop('trying'), 'us': {}}); tell()
"""


@pytest.mark.parametrize(
    ("breaks", "why"),
    [("os.abort()", "its process ended with -6"), ("time.sleep(60)", "hung for 1 s")],
)
def test_process_that_an_arm_breaks_or_hangs_goes_on_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str, why: str
) -> None:
    path = tmp_path / "op.tune.json"
    assert not process(TRIES.replace("BREAK", breaks), path, monkeypatch)
    assert Notes.read(path).lines["16"]["arms"] == [
        {"tile": {"width": 1}, "dropped": why},
        {"tile": {"width": 2}, "us": {}},
    ]


def test_process_that_fails_by_itself_is_not_tried_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "op.tune.json"
    assert process("tell(); sys.exit(1)", path, monkeypatch) == "its process ended with 1"
    assert process("sys.exit(3)", path, monkeypatch) == "no time left"


def test_arm_that_time_cut_off_is_as_if_untried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "op.tune.json"
    script = TRIES.replace("BREAK", "time.sleep(60)")
    assert process(script, path, monkeypatch, seconds=0.8) == "no time left"
    assert Notes.read(path).lines == {"16": {"arms": []}}


def test_sglangs_file_is_named_and_read_as_sglang_does(tmp_path: Path) -> None:
    path = sglang_config.path_of(256, 2048, "NVIDIA H100 80GB HBM3", tmp_path)
    assert path.name == (
        "E=256,N=2048,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8,block_shape=[128, 128].json"
    )
    assert sglang_config.tile_for(path, 1) is None
    path.write_text(json.dumps({"1": {"BLOCK_SIZE_M": 16}, "64": {"BLOCK_SIZE_M": 64}}))
    assert sglang_config.tile_for(path, 8) == {"BLOCK_SIZE_M": 16}
    assert sglang_config.tile_for(path, 4096) == {"BLOCK_SIZE_M": 64}


def test_sglangs_fastest_tile_is_kept_and_what_fails_is_told() -> None:
    def time_us(num_tokens: int, tile: Mapping[str, int]) -> float:
        if tile["num_stages"] == 5:
            raise RuntimeError("out of resource")
        return abs(tile["BLOCK_SIZE_M"] - num_tokens) + tile["GROUP_SIZE_M"] / 100

    (small, arms), (large, _) = (sglang_config.tune(number, time_us) for number in (1, 64))
    assert small is not None
    assert large is not None
    assert (small["BLOCK_SIZE_M"], small["GROUP_SIZE_M"], large["BLOCK_SIZE_M"]) == (16, 1, 64)
    assert [arm["tile"] for arm in arms] == list(sglang_config.TILES)
    assert {arm["dropped"] for arm in arms if "dropped" in arm} == {
        "RuntimeError('out of resource')"
    }


def test_report_of_a_gpu_elsewhere_is_written_into_this_tree(tmp_path: Path) -> None:
    """Another device class's: an H100's file stays, and SGLang's tiles come with it."""
    h100s = tiles.path_of(H100).read_text("utf-8")
    tiles.path_of(H100, tmp_path).write_text(h100s)
    tile = configs.Tile(64, 128, 128, stages=3, tma=True)
    old = dict(tiles.tables_of("fp8_gemm", configs.Tile, tmp_path)[H100])[128]
    line = {"before": asdict(old), "after": asdict(tile), "us": 8.0, "before_us": 9.0, "arms": []}
    theirs = {"BLOCK_SIZE_M": 16}
    report = {
        "device": "NVIDIA H200", "device_class": "9.0-132-4", "commit": "abc", "day": "2026-11-23",
        "tables": {
            "fp8_gemm": {"128": line, "16": {"before": {}, "arms": []}},
            "sglang": {"1": {"after": theirs}, "64": {"after": None}},
        },
    }  # fmt: skip
    tune.write_tiles(report, tmp_path, tmp_path / "theirs")
    tables = tiles.tables_of("fp8_gemm", configs.Tile, tmp_path)
    assert dict(tables[H200])[128] == tile
    assert tables[H100] == tiles.tables_of("fp8_gemm", configs.Tile)[H100]
    assert "# 8.0 us, 9.0 before; NVIDIA H200, abc, 2026-11-23" in tiles.path_of(
        H200, tmp_path
    ).read_text("utf-8")
    (path,) = (tmp_path / "theirs").iterdir()
    assert path.name.startswith("E=256,N=2048,device_name=NVIDIA_H200,")
    assert json.loads(path.read_text("utf-8")) == {"1": theirs}


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """A device to ask for its name; what would be written into the tree is listed."""
    written: list[Mapping[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(tune, "device_class", lambda _: H100)
    monkeypatch.setattr(tune, "write_tiles", written.append)
    return written


def test_what_a_table_found_is_kept_before_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, h100: list[Mapping[str, Any]]
) -> None:
    known: dict[str, Any] = {"first": {"16": {"arms": [], "before": {}}}}
    line = {"after": {"width": 2}, "before": {"width": 1}, "arms": []}

    def apart(
        name: str, found: Mapping[str, Any], seconds: float, log: Path
    ) -> tuple[dict[str, Any], str]:
        if name == "second":
            report = json.loads((tmp_path / "tune.json").read_text("utf-8"))
            assert report["tables"]["first"] == {"16": line}
            assert seconds <= 100
            return {}, "its process ended with -6"
        assert found == known["first"]
        assert seconds <= 100
        return {"16": line}, ""

    monkeypatch.setattr(tune, "tune_apart", apart)
    assert tune.tune_all(["first", "second"], tmp_path, 100, "abc", known) == 1
    report = json.loads((tmp_path / "tune.json").read_text("utf-8"))
    assert report["unfinished"] == {"second": "its process ended with -6"}
    assert (report["device_class"], report["commit"]) == ("9.0-132-3", "abc")
    assert [each["tables"]["first"] for each in h100] == [{"16": line}] * 2
    assert tune.known_from(tmp_path / "tune.json") == report["tables"]


@pytest.mark.usefixtures("h100")
def test_times_of_other_kernels_are_not_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "tune.json"
    path.write_text(json.dumps({**tune.record({}, {}, "abc"), "kernels": "others"}))
    with pytest.raises(ValueError, match="of kernels others, and here is"):
        tune.known_from(path)
