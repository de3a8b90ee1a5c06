"""Draw a loss curve in characters: `python -m training.plot models/demo/curve.csv`."""

import argparse
import csv
from pathlib import Path

WIDTH, HEIGHT = 72, 16
SMOOTHING = 10  # steps averaged into one point of the train curve
TRAIN_MARK, HELD_OUT_MARK = ".", "o"
Point = tuple[float, float]


def read_curve(path: Path) -> tuple[list[Point], list[Point]]:
    """(step, loss) of the train curve, smoothed, and of the held-out one."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    held_out = [
        (float(row["step"]), float(row["held_out_loss"])) for row in rows if row["held_out_loss"]
    ]
    groups = [rows[start : start + SMOOTHING] for start in range(0, len(rows), SMOOTHING)]
    train = [(_mean(group, "step"), _mean(group, "train_loss")) for group in groups]
    return train, held_out


def _mean(rows: list[dict[str, str]], name: str) -> float:
    return sum(float(row[name]) for row in rows) / len(rows)


def draw(train: list[Point], held_out: list[Point]) -> str:
    points = train + held_out
    last_step = max(step for step, _ in points)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    grid = [[" "] * (WIDTH + 1) for _ in range(HEIGHT + 1)]
    for series, mark in ((train, TRAIN_MARK), (held_out, HELD_OUT_MARK)):
        for step, loss in series:
            row = round((high - loss) / (high - low) * HEIGHT)
            grid[row][round(step / last_step * WIDTH)] = mark
    lines = [
        f"{high - (high - low) * row / HEIGHT:5.2f} |{''.join(cells).rstrip()}"
        for row, cells in enumerate(grid)
    ]
    axis = " " * 6 + "+" + "-" * (WIDTH + 1)
    legend = (
        f"       steps 0 to {last_step:.0f}; {TRAIN_MARK} train, {HELD_OUT_MARK} held out, nats"
    )
    return "\n".join([*lines, axis, legend])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curve", type=Path)
    print(draw(*read_curve(parser.parse_args().curve)))


if __name__ == "__main__":
    main()
