"""The README's figures and tables, from the CSV files in tests/benchmark/results/.

    python tests/benchmark/plot.py             # draws the figures, and renews the README

In the README a table stands between <!-- NAME --> and <!-- end -->, as do, in one line, the effect
of a detail, <!-- worth DETAIL -->, a mean return, <!-- mean ENVIRONMENT -->, the length of a
script, <!-- lines SCRIPT -->, and that of a recipe, <!-- changes RECIPE -->. A link to a line of
code has that code as its text, which tells where it leads: [`code`](ppo_discrete.py#L1). Intervals
are 95% intervals of the mean over the seeds, by the bootstrap: percentiles of the means of
resampled seeds.
"""

import ast
import io
import math
import re
import statistics
import tokenize

import ablation
import matplotlib
import numpy as np
import speed
from learning import ALL, HELD_OUT, POINTS, TARGETS, TASKS
from speed import RESULTS, ROOT, markdown, read

README = ROOT / "README.md"
STEPS = {env_id: task.total_timesteps for env_id, task in ALL.items()}
OURS, PEER = "ours", "stable-baselines3"
# bright enough for a dark page, and dark enough for a white one
INK, COLORS = "#808080", {OURS: "#2f81f7", PEER: "#e8743b"}
LABELS = {OURS: "ours, its defaults", PEER: "Stable-Baselines3, RL Zoo's settings per task"}
# greedy return of the RL Zoo's published agents (one each; the landers are v2 there), and the
# millions of steps they learned from (rl-baselines3-zoo, benchmark.md)
ZOO = {
    "CartPole-v1": (500.0, 0.1),
    "Acrobot-v1": (-73.5, 1.0),
    "MountainCar-v0": (-110.4, 1.0),
    "LunarLander-v3": (242.1, 1.0),
    "Pendulum-v1": (-172.2, 0.1),
    "LunarLanderContinuous-v3": (270.9, 1.0),
    "BipedalWalker-v3": (287.9, 5.0),
}


def interval(values, resamples: int = 10_000) -> tuple:
    """95% bootstrap interval of the mean: values [seeds, ...] -> low [...], high [...]."""
    values = np.asarray(values, float)
    chosen = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    counts = np.apply_along_axis(np.bincount, 1, chosen, minlength=len(values))
    return tuple(np.percentile(counts @ values / len(values), (2.5, 97.5), axis=0))


def rows_of(name: str, contender: str, environment: str) -> list[dict]:
    """Rows of a file about a contender in an environment, one for each seed, in their order."""
    tasks = ablation.TASKS if name.startswith("ablation") else STEPS
    run = {"contender": contender, "environment": environment}
    run["total_timesteps"] = str(tasks[environment])
    rows = [row for row in read(RESULTS / name) if run.items() <= row.items()]
    return [row for _, row in sorted({int(row["seed"]): row for row in rows}.items())]


def by_seed(rows: list[dict]) -> dict[int, float]:
    """Greedy returns."""
    return {int(row["seed"]): float(row["greedy_return"]) for row in rows}


def numbers(rows: list[dict], column: str) -> np.ndarray:
    return np.array([float(row[column] or "nan") for row in rows])


def amount(value: float) -> str:
    """A number of steps: 94k, 1.2M."""
    return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.0f}k"


def describe(rows: list[dict]) -> str:
    """Mean greedy return, its interval and the number of seeds."""
    if not rows:
        return "not run"
    values = numbers(rows, "greedy_return")
    if len(rows) == 1:
        return f"{values[0]:.1f} (1)"
    low, high = interval(values)
    return f"{values.mean():.1f} [{low:.1f}, {high:.1f}] ({len(rows)})"


def first_time(rows: list[dict], name: str) -> str:
    """Median steps to a mark; never is later than any number."""
    if not rows:
        return "not run"
    steps = np.nan_to_num(numbers(rows, f"{name}_steps"), nan=np.inf)
    misses = int(np.isinf(steps).sum())
    if misses == len(rows):
        return f"never ({misses} of {misses})"
    median = statistics.median(steps)
    text = "never" if np.isinf(median) else amount(median)
    return text + (f" ({misses} of {len(rows)} never)" if misses else "")


def results_table() -> str:
    header = ["environment", "steps", "ours: mean [95% interval] (seeds)", "worst seed"]
    header += ["Stable-Baselines3, Zoo's settings", "published Zoo agent (its steps)"]
    table = []
    for env_id, (zoo, zoo_steps) in ZOO.items():
        ours, peer = rows_of("learning.csv", OURS, env_id), rows_of("learning.csv", PEER, env_id)
        worst = min(by_seed(ours).values(), default=math.nan)
        cells = [f"{STEPS[env_id]:,}", describe(ours), f"{worst:.1f}", describe(peer)]
        table.append([env_id, *cells, f"{zoo} ({amount(zoo_steps * 1e6)})"])
    return markdown(header, table)


def held_out_table() -> str:
    table = []
    for env_id, task in HELD_OUT.items():
        rows = rows_of("learning.csv", OURS, env_id)
        worst = min(by_seed(rows).values(), default=math.nan)
        cells = [f"{task.total_timesteps:,}", str(task.mark), describe(rows), f"{worst:.1f}"]
        table.append([env_id, *cells, first_time(rows, "solved")])
    header = ["environment", "steps", "mark", "mean [95% interval] (seeds)", "worst seed"]
    header.append("mark reached after (median)")
    return markdown(header, table)


def seeds_table() -> str:
    values = {env_id: by_seed(rows_of("learning.csv", OURS, env_id)) for env_id in TASKS}
    seeds = sorted(set().union(*values.values()))
    table = []
    for env_id, returns in values.items():
        cells = [f"{returns[seed]:.0f}" if seed in returns else "" for seed in seeds]
        table.append([env_id, *cells])
    return markdown(["seed", *map(str, seeds)], table)


def solve_table() -> str:
    table = []
    for env_id, task in TASKS.items():
        both = [rows_of("learning.csv", contender, env_id) for contender in (OURS, PEER)]
        times = [first_time(rows, "solved") for rows in both]
        table.append([f"{env_id} ({task.mark})", *times])
    return markdown(["environment (mark)", "ours", "Stable-Baselines3, Zoo's settings"], table)


def target_table() -> str:
    table = []
    for env_id, target in TARGETS.items():
        for contender in (OURS, PEER):
            rows = rows_of("learning.csv", contender, env_id)
            reached = int(np.isfinite(numbers(rows, "target_steps")).sum())
            cells = [f"{reached} of {len(rows)}", first_time(rows, "target").partition(" (")[0]]
            table.append([f"{env_id}, {target}", LABELS[contender], *cells])
    return markdown(["environment, target", "", "seeds that reached it", "median"], table)


def effects(environment: str) -> dict[str, np.ndarray]:
    """Change in greedy return by each changed detail, seed by seed."""
    base = by_seed(rows_of("ablation.csv", OURS, environment))
    changes = {}
    for name in ablation.DETAILS:
        changed = by_seed(rows_of("ablation.csv", name, environment))
        if common := base.keys() & changed.keys():
            changes[name] = np.array([changed[seed] - base[seed] for seed in sorted(common)])
    return changes


def ablation_table() -> str:
    columns = {env_id: effects(env_id) for env_id in ablation.TASKS}
    first = [describe(rows_of("ablation.csv", OURS, env_id)) for env_id in columns]
    table = [["the defaults: greedy return", *first]]
    for name in ablation.DETAILS:
        cells = []
        for changes in columns.values():
            cells.append("")
            if name in changes:
                low, high = interval(changes[name])
                cells[-1] = f"{changes[name].mean():+.0f} [{low:+.0f}, {high:+.0f}]"
        table.append([name, *cells])
    header = [f"{env_id}, {amount(steps)} steps" for env_id, steps in ablation.TASKS.items()]
    return markdown(["", *header], table)


TABLES = {
    "results": results_table,
    "seeds": seeds_table,
    "held out": held_out_table,
    "solve": solve_table,
    "target": target_table,
    "ablation": ablation_table,
    "speed": speed.speed_table,
    "split": speed.split_table,
    "scaling": speed.scaling_table,
}


def worth(detail: str) -> str:
    """Mean change by a detail in each task that has it."""
    changes = [effects(env_id).get(detail) for env_id in ablation.TASKS]
    return " / ".join("–" if change is None else f"{change.mean():+.0f}" for change in changes)


def lines(script: str) -> str:
    """How many lines of code the script has, and how many in all."""
    source = (ROOT / script).read_text()
    code, skip = set(), ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] not in skip:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            code -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return f"{len(code)} (of {len(source.splitlines()):,})"


def line_of(code: str, script: str) -> int:
    """The number of the one line of the script that has the code."""
    lines = (ROOT / script).read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if code in line]
    if len(found) != 1:
        raise ValueError(f"README.md: {code!r} stands in {len(found)} lines of {script}, not in 1")
    return found[0]


def changes(recipe: str) -> str:
    """How many lines a recipe changes: removed and added ones."""
    _, *hunks = (ROOT / "tests" / "recipes" / f"{recipe}.patch").read_text().split("\n@@")
    return str(len(re.findall(r"^[+-]", "\n".join(hunks), re.MULTILINE)))


def mean(env_id: str) -> str:
    """Mean greedy return of the defaults."""
    return f"{numbers(rows_of('learning.csv', OURS, env_id), 'greedy_return').mean():.0f}"


INLINE = {"worth": worth, "lines": lines, "changes": changes, "mean": mean}


def renew(readme: str) -> str:
    """The text of the README with the tables, effects and line numbers of now."""

    def table(match: re.Match) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    def inline(match: re.Match) -> str:
        return f"{match[1]}{INLINE[match[2]](match[3])}{match[4]}"

    def link(match: re.Match) -> str:
        return f"[`{match[1]}`]({match[2]}#L{line_of(match[1], match[2])})"

    readme = re.sub(r"(<!-- ([\w ]+?) -->\n).*?(<!-- end -->)", table, readme, flags=re.DOTALL)
    readme = re.sub(r"(<!-- (worth|lines|changes|mean) (.+?) -->).*?(<!-- end -->)", inline, readme)
    return re.sub(r"\[`([^`]+)`\]\((\w+\.py)#L\d+\)", link, readme)


def curves(contender: str, environment: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps [points], seconds and returns [seeds, points] of the runs."""
    rows = rows_of("curves.csv", contender, environment)
    steps = (np.arange(POINTS) + 1) / POINTS * float(rows[0]["total_timesteps"])
    seconds = np.array([row["seconds"].split() for row in rows], float)
    returns = np.array([row["returns"].split() for row in rows], float)
    for line in returns:  # in some parts no episode ended
        known = np.isfinite(line)
        line[~known] = np.interp(steps[~known], steps[known], line[known])
        line[: known.argmax()] = np.nan
    return steps, seconds, returns


def draw_curves(plt, of_seconds: bool):
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6), layout="constrained")
    for axis, (env_id, task) in zip(axes.flat, TASKS.items(), strict=False):
        for contender, color in COLORS.items():
            if not rows_of("curves.csv", contender, env_id):
                continue
            steps, seconds, returns = curves(contender, env_id)
            x = steps
            if of_seconds:  # as far as all seeds go
                x = np.linspace(0, seconds[:, -1].min(), POINTS + 1)[1:]
                pairs = zip(seconds, returns, strict=True)
                returns = np.array([np.interp(x, s, r, left=np.nan) for s, r in pairs])
            low, high = interval(returns, resamples=1_000)
            axis.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
            axis.plot(x, returns.mean(0), color=color, linewidth=1.6, label=LABELS[contender])
        axis.axhline(task.mark, color=INK, linewidth=0.8, linestyle=":")
        axis.set_title(env_id)
        if not of_seconds:
            axis.xaxis.set_major_formatter(lambda value, _: amount(value) if value else "0")
    legend = axes.flat[-1]
    legend.axis("off")
    legend.legend(*axes.flat[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.supxlabel("CPU seconds of training, one thread" if of_seconds else "steps")
    figure.supylabel("return of training episodes")
    return figure


def draw_ablation(plt):
    figure, axes = plt.subplots(1, 3, figsize=(13, 5.2), sharey=True, layout="constrained")
    names = [*ablation.DETAILS]
    for axis, env_id in zip(axes, ablation.TASKS, strict=True):
        for name, change in effects(env_id).items():
            y, (low, high) = names.index(name), interval(change)
            color = COLORS[PEER] if high < 0 else COLORS[OURS] if low > 0 else INK
            axis.plot([low, high], [y, y], color=color, linewidth=2)
            axis.plot(change.mean(), y, "o", color=color, markersize=6)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_xscale("symlog", linthresh=30)
        axis.set_xticks([-1000, -100, 0, 100], minor=False)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_title(f"{env_id}, {amount(ablation.TASKS[env_id])} steps")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.supxlabel("change in greedy return, mean and 95% interval over the seeds")
    return figure


def draw() -> None:
    """The figures, as PNG and SVG."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plain = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "ppo"}
    plt.rcParams.update(dict.fromkeys(inked, INK) | plain | {"axes.titlesize": 11})
    figures = {"curves_steps": draw_curves(plt, False), "curves_seconds": draw_curves(plt, True)}
    if read(RESULTS / "ablation.csv"):
        figures["ablation"] = draw_ablation(plt)
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            metadata = {"Date": None} if suffix == "svg" else None  # the same data, the same file
            path = RESULTS / f"{name}.{suffix}"
            figure.savefig(path, transparent=True, dpi=110, metadata=metadata)
            print(f"wrote {path.name}")


def main() -> None:
    draw()
    README.write_text(renew(README.read_text()))


if __name__ == "__main__":
    main()
