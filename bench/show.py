"""What the speed table's rows look like: text, Markdown, a plot. A row is a dict as in the JSON file."""

from __future__ import annotations

from pathlib import Path

from measure import replacing

MODES = {"inference": "inference", "training": "forward + backward"}


def groups(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """Rows by (dtype, neurons), in the order in which they were measured."""
    found: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        found.setdefault((row["dtype"], row["neurons"]), []).append(row)
    return found


def byte_size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


#: Above this share of CPU time used by others, times are called into doubt.
BUSY = 0.05
TICKS = (1, 2, 5, 10, 20, 50, 100, 200)
HEADER = (
    f"{'':25}{'inference':^46}{'forward + backward':^52}{'bytes per neuron-step':>25}\n"
    f"{'':25}" + f"{'ns':>8} {'p20-p80':>13} {'copies':>7} {'GB/s':>6} {'% copy':>7} " + f"{'ns':>8} {'p20-p80':>13} {'copies':>7} {'GB/s':>6} {'% copy':>7} {'best/this':>9} "
    f"{'infer':>8} {'live':>8} {'peak':>8}  n"
)


def text(configuration: str, rows: list[dict]) -> str:
    """One configuration, as printed while the benchmark runs."""
    lines = [f"\n{configuration}", HEADER]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['competitor']:25}{row['status']}: {row['reason']}")
            continue
        cells = f"{row['competitor']:25}"
        for mode in MODES:
            m = row[mode]
            if m is None:
                cells += " " * (46 if mode == "inference" else 56)
                continue
            between = f"{m['ns_p20']:.3g}-{m['ns_p80']:.3g}"
            cells += f"{m['ns']:8.4g} {between:>13} {m['copies']:7.2f} {m['gb_per_s']:6.4g} {m['percent_of_copy']:7.0f} "
            if mode == "training":
                cells += f"{number(m['best_other_over_this']):>9} "
        memory = row["memory"]
        if memory:
            cells += f"{memory['inference_peak']:8.2f} {memory['live_after_forward']:8.2f} {memory['training_peak']:8.2f}  "
        lines.append(cells + str(row["samples"]))
        if row["flips"]:
            lines.append(f"{'':25}{row['flips']} neurons leave the reference's spikes, each first within {row['band']:.1e} of the threshold")
        if row["compile_seconds"]:
            lines.append(f"{'':25}compiled in {row['compile_seconds']['inference']:.1f} s + {row['compile_seconds']['training']:.1f} s, not counted above")
    share = rows[0]["cpu_used_by_others"]
    if share > BUSY:
        lines.append(f"Beware: other processes used {share:.0%} of this machine's CPU time meanwhile; these times are not the layer's.")
    return "\n".join(lines)


def headline(data: dict) -> str:
    machine, versions, settings = data["machine"], data["versions"], data["settings"]
    where = machine["gpu"] if settings["device"] == "cuda" else f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    peers = "".join(f", {name} {versions[name]}" for name in ("spikingjelly", "snntorch") if versions[name])
    commit = data["commit"]["commit"]
    state = "" if not commit else f", commit {commit[:10]}" + (" with changes" if data["commit"]["dirty"] else "")
    return f"{where}; torch {versions['torch']}{peers}{state}"


def markdown(data: dict) -> str:
    """The Markdown tables of a JSON file."""
    lines = [headline(data), ""]
    for (dtype, neurons), rows in groups(data["rows"]).items():
        steps = sorted({row["steps"] for row in rows})
        by_name: dict[str, dict[int, dict]] = {}
        for row in rows:
            by_name.setdefault(row["competitor"], {})[row["steps"]] = row
        for mode, title in MODES.items():
            lines += [f"{title}, {dtype}, {neurons:,} neurons, in copies of x (ns per neuron-step)", ""]
            lines += ["| | " + " | ".join(f"T = {t}" for t in steps) + " |", "| --- |" + " --- |" * len(steps)]
            for name, at in by_name.items():
                cells = [cell(at.get(t), mode) for t in steps]
                if any(cell != "–" for cell in cells):
                    lines.append(f"| {name} | " + " | ".join(cells) + " |")
            lines.append("")
        lines += [f"bytes per neuron-step beyond x and the incoming gradient, {dtype}, {neurons:,} neurons: inference / live after forward / peak of forward + backward", ""]
        lines += ["| | " + " | ".join(f"T = {t}" for t in steps) + " |", "| --- |" + " --- |" * len(steps)]
        keys = ("inference_peak", "live_after_forward", "training_peak")
        for name, at in by_name.items():
            cells = [" / ".join(f"{row['memory'][key]:.2f}" for key in keys) if (row := at.get(t)) and row["memory"] else "–" for t in steps]
            if any(cell != "–" for cell in cells):
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    absent = {f"{row['competitor']}: {row['status']}, {row['reason']}" for row in data["rows"] if row["status"] != "ok"}
    busy = {(row["dtype"], row["neurons"], row["steps"]) for row in data["rows"] if row["cpu_used_by_others"] > BUSY}
    if busy:
        where = "; ".join(f"{dtype}, {neurons:,} neurons, T = {steps}" for dtype, neurons, steps in sorted(busy))
        lines.append(f"Other processes used more than {BUSY:.0%} of the machine at {where}: these times are not the layer's alone.\n")
    return "\n".join(lines + sorted(absent)).rstrip()


def cell(row: dict | None, mode: str) -> str:
    if row is None or row["status"] == "not run":
        return "–"
    if row["status"] != "ok":
        return row["status"]
    m = row[mode]
    return "–" if m is None else f"{m['copies']:.2f} ({m['ns']:.3g})"


def pyplot():
    """matplotlib's pyplot, without a display; raises ImportError naming the cure."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(data: dict, path: Path) -> None:
    """Copies of x against T, one line per competitor; a row of panels per (dtype, neurons)."""
    pyplot_ = pyplot()
    found = groups(data["rows"])
    figure, axes = pyplot_.subplots(len(found), 2, figsize=(11, 4 * len(found)), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(row["competitor"] for row in data["rows"]))
    for ((dtype, neurons), rows), panels in zip(found.items(), axes):
        for (mode, title), panel in zip(MODES.items(), panels):
            for place, name in enumerate(names):
                points = sorted((row["steps"], row[mode]["copies"]) for row in rows if row["competitor"] == name and row["status"] == "ok" and row[mode])
                if points:
                    ours = name.startswith("fastsnn")
                    panel.plot(*zip(*points), label=name, color=f"C{place % 10}", marker="o" if ours else "s", linewidth=2.2 if ours else 1.1)
            panel.axhline(1, color="0.6", linewidth=1, linestyle=":")
            panel.set(xscale="log", yscale="log", title=f"{title}, {dtype}, {neurons:,} neurons", xlabel="T (steps)", ylabel="time / time to copy x")
            panel.set_xticks(sorted({row["steps"] for row in rows}), labels=[str(t) for t in sorted({row["steps"] for row in rows})])
            panel.minorticks_off()
            panel.set_yticks(TICKS, labels=[str(tick) for tick in TICKS])
            panel.grid(alpha=0.25)
    figure.suptitle(headline(data), fontsize=8)
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=5, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    pyplot_.close(figure)
