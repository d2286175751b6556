"""The figures, and the tables of the two READMEs, from the CSV files in results/.

    python tests/benchmark/plot.py

A table stands between <!-- NAME --> and <!-- end -->, where NAME is that of a function below. The
curves are drawn against steps, and, of tasks with both contenders, against seconds.
"""

import math
import re
import statistics
from pathlib import Path

import matplotlib
import numpy as np
from common import RESULTS, ROOT, read
from learning import ALL, POINTS, TASKS

PAGES = [ROOT / "README.md", Path(__file__).parent / "README.md"]
# bright enough for a dark page, and dark enough for a white one
INK, COLORS = "#808080", ["#2f81f7", "#e8743b", "#2da44e", "#a371f7"]


def table(cells: dict[tuple[str, str], str]) -> str:
    """The cell of each (line, column), in Markdown; both in the order in which they first come."""
    if not cells:
        return "Not measured yet.\n"
    first, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[line, *(cells.get((line, column), "") for column in columns)] for line in first]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def grouped(path: Path, *columns: str) -> dict[tuple[str, ...], list[dict]]:
    """The rows of a file that agree in these columns, in the order of learning.ALL."""
    order, groups = [*ALL], {}
    for row in sorted(read(path), key=lambda row: order.index(row["environment"])):
        row["who"] = f"{row['contender']} {row['options']}".strip()
        row["task"] = f"{row['environment']}, {int(row['steps']):,} steps"
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def by_seed(rows: list[dict]) -> dict[str, float]:
    return {row["seed"]: float(row["greedy_return"]) for row in rows}


def short(value: float, digits: int) -> str:
    """Rounded, and without an exponent."""
    return f"{float(f'{value:.{digits}g}'):g}"


def spread(values: list[float]) -> str:
    """Mean and deviation."""
    deviation = f" ± {short(np.std(values, ddof=1), 2)}" if len(values) > 1 else ""
    return short(np.mean(values), 4) + deviation


def median(rows: list[dict], column: str) -> str:
    """The median over the runs; one that never reached the mark comes after all others."""
    if any(row["mark_steps"] and not row[column] for row in rows):
        return ""  # it was not measured
    value = statistics.median(float(row[column] or "inf") for row in rows)
    return "never" if math.isinf(value) else f"{value:,.0f}"


def learning(folder: Path) -> str:
    cells = {}
    for (task, who), rows in grouped(folder / "learning.csv", "task", "who").items():
        line, returns = f"{task}: {who}", [*by_seed(rows).values()]
        reached = sum(bool(row["mark_steps"]) for row in rows)
        cells[line, "greedy return"] = spread(returns)
        cells[line, "worst seed"] = short(min(returns), 4)
        if best := [float(row["best_mean"]) for row in rows if row.get("best_mean")]:
            cells[line, "best mean of 100"] = spread(best)
        cells[line, "mark"] = str(ALL[rows[0]["environment"]][2])
        cells[line, "reached by"] = f"{reached} of {len(rows)}"
        cells[line, "after steps"] = median(rows, "mark_steps")
        cells[line, "CPU s"] = median(rows, "mark_cpu_seconds")
        cells[line, "wall s"] = median(rows, "mark_wall_seconds")
    return table(cells)


def solved(folder: Path) -> str:
    """CPU seconds of a process up to the mark, of the seeds that a peer has run as well."""
    cells = {}
    for (task,), rows in grouped(folder / "learning.csv", "task").items():
        seconds = {"ours": {}, "stable-baselines3": {}}
        for row in rows:
            reached = float(row["mark_cpu_seconds"] or "inf")
            seconds.setdefault(row["who"], {})[row["seed"]] = reached
        ours, peers = seconds["ours"], seconds["stable-baselines3"]
        if seeds := sorted(ours.keys() & peers.keys(), key=int):
            for who, times in (("ours", ours), ("stable-baselines3", peers)):
                each = [f"{times[seed]:.0f}".replace("inf", "never") for seed in seeds]
                cells[task, who] = ", ".join(each)
            middle, other = (statistics.median(x[s] for s in seeds) for x in (ours, peers))
            cells[task, "ratio of medians"] = f"{other / middle:.1f}".replace("inf", "")
    return table(cells)


def summary(folder: Path) -> str:
    """Our greedy returns with the defaults, on the seven main tasks."""
    cells = {}
    for (task, who), rows in grouped(folder / "learning.csv", "task", "who").items():
        if who == "ours" and rows[0]["environment"] in TASKS:
            returns = [*by_seed(rows).values()]
            cells[task, "greedy return"] = f"{np.mean(returns):.1f}"
            cells[task, "worst seed"] = f"{min(returns):.1f}"
            cells[task, "seeds"] = str(len(returns))
    return table(cells)


def ablation(folder: Path) -> str:
    """Change in greedy return, seed by seed: mean and standard error."""
    groups, cells = grouped(folder / "ablation.csv", "task", "contender"), {}
    for (task, detail), rows in sorted(groups.items(), key=lambda group: group[0][1] != "ours"):
        base, changed = by_seed(groups.get((task, "ours"), [])), by_seed(rows)
        if detail == "ours":
            cells["the defaults: greedy return", task] = spread([*base.values()])
        elif changes := [changed[seed] - base[seed] for seed in base.keys() & changed.keys()]:
            cells[detail, task] = f"{np.mean(changes):+.0f}"
            if len(changes) > 1:
                cells[detail, task] += f" ± {np.std(changes) / math.sqrt(len(changes) - 1):.0f}"
    return table(cells)


def medians(folder: Path, column: str) -> dict[tuple[str, str], float]:
    rows = read(folder / "speed.csv")
    return {(r["setting"], r["contender"]): float(r[column]) for r in rows if r[column]}


def speed(folder: Path) -> str:
    """Steps per second, and how many times those of ours."""
    cells = medians(folder, "steps_per_second")
    ours = {setting: value for (setting, who), value in cells.items() if who == "ours"}
    return table({k: f"{v:,.0f} ({v / ours.get(k[0], math.nan):.2f})" for k, v in cells.items()})


def start(folder: Path) -> str:
    """Seconds to the first step, and to the end of the first iteration."""
    first = medians(folder, "first_step_s")
    ends = medians(folder, "first_iteration_s")
    return table({k: f"{v:.1f}, {ends[k]:.1f}" for k, v in first.items()})


def gradient(folder: Path) -> str:
    """Microseconds of a gradient step."""
    return table({k: f"{v:.0f}" for k, v in medians(folder, "gradient_step_us").items()})


TABLES = {
    function.__name__: function
    for function in (learning, solved, summary, ablation, speed, start, gradient)
}


def render(page: str) -> str:
    """The page with the tables of now."""

    def renew(match: re.Match) -> str:
        return f"{match[1]}\n{TABLES[match[2]](RESULTS)}\n{match[3]}"

    pattern = r"(<!-- (\w+) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, renew, page, flags=re.DOTALL)


def average(rows: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean and deviation of the curves of the seeds in which an episode ended."""
    steps = np.arange(1, POINTS + 1) / POINTS * float(rows[0]["steps"])
    curves = np.array([row["curve"].split() for row in rows], float)
    curves = curves[np.isfinite(curves).any(1)]
    for line in curves:  # there may be parts in which no episode ended
        known = np.isfinite(line)
        line[:] = np.interp(steps, steps[known], line[known], left=np.nan)
    return steps, curves.mean(0), curves.std(0)


def paired(contenders: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The runs with seeds that every contender has run; nothing where there are none."""
    seeds = [{row["seed"] for row in rows} for rows in contenders.values()]
    shared = set.intersection(*seeds)
    if len(contenders) < 2 or not shared:
        return {}
    return {who: [r for r in rows if r["seed"] in shared] for who, rows in contenders.items()}


def draw(folder: Path, against: str) -> None:
    """Curves against "steps" or "CPU seconds": mean over the seeds, and a band of one deviation."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plt.rcParams.update(dict.fromkeys(inked, INK) | {"axes.titlesize": 10})
    tasks, colors = {}, {}
    for (task, who), rows in grouped(folder / "learning.csv", "task", "who").items():
        colors.setdefault(who, COLORS[len(colors) % len(COLORS)])
        if against == "steps" or all(row.get("curve_cpu_seconds") for row in rows):
            tasks.setdefault(task, {})[who] = rows
    if against != "steps":
        tasks = {task: paired(contenders) for task, contenders in tasks.items()}
        tasks = {task: contenders for task, contenders in tasks.items() if contenders}
    if not tasks:
        return
    columns = min(4, len(tasks))
    size = dict(figsize=(3.3 * columns, 2.6 * math.ceil(len(tasks) / columns)), squeeze=False)
    figure, axes = plt.subplots(-(-len(tasks) // columns), columns, layout="constrained", **size)
    for axis, contenders in zip(axes.flat, tasks.values(), strict=False):
        for who, rows in contenders.items():
            x, mean, deviation = average(rows)
            if against != "steps":
                x = np.array([row["curve_cpu_seconds"].split() for row in rows], float).mean(0)
            axis.plot(x, mean, color=colors[who], label=who)
            band = dict(color=colors[who], alpha=0.25, linewidth=0)
            axis.fill_between(x, mean - deviation, mean + deviation, **band)
        axis.axhline(ALL[rows[0]["environment"]][2], color=INK, linewidth=0.8, linestyle=":")
        axis.set_title(rows[0]["environment"])
        if against == "steps":
            axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e3:g}k")
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    lines = [plt.Line2D([], [], color=color) for color in colors.values()]
    figure.legend(lines, colors, loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel(against)
    figure.supylabel("return of training episodes")
    name = "curves.png" if against == "steps" else "seconds.png"
    figure.savefig(folder / name, transparent=True, dpi=110)
    plt.close(figure)


def main() -> None:
    for against in ("steps", "CPU seconds"):
        draw(RESULTS, against)
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
