"""The report of ``measure.py``'s figures, as Markdown."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

PAPERS_ROWS = 640_000
"""Sequences of the papers' DA-training: 2,500 steps of 256."""
PAPERS_IMPORTANCE_ROWS = 10_000
NAME_LENGTH = 90
"""Characters of a kernel's name that are shown: template arguments run to hundreds."""

TARGETS = (
    # Shape, run, figure, limit, words.
    ("roberta-large", "mlm", "mfu", 0.50, "MFU of plain MLM, roberta-large, at least 50%"),
    ("roberta-large", "dga update", "mfu", 0.45, "MFU of DGA, roberta-large, at least 45%"),
    (
        "roberta-base",
        "dga update",
        "minutes",
        15.0,
        "papers' DA-training of roberta-base, at most 15 minutes",
    ),
)

Found = Mapping[str, Any]
"""What ``measure.Bench.found`` says of a shape; ``trainer`` and ``program``: what was run besides."""


def report(shapes: Mapping[str, Found], sequence_length: int, global_batch: int) -> str:
    """All tables."""
    first = next(iter(shapes.values()))
    parts = [
        _machine(first),
        _conditions(first, sequence_length, global_batch),
        "\n".join(_targets(shapes)),
        "\n".join(_runs(shapes)),
        "Rows in a pass, with one pass in a step:",
        "\n".join(_sweeps(shapes)),
        *_traces(shapes),
        *_programs(shapes),
        *_repeats(shapes),
        *_failures(shapes),
    ]
    return "\n\n".join(parts)


def _conditions(found: Found, sequence_length: int, global_batch: int) -> str:
    return (
        f"{global_batch} rows of {sequence_length} tokens in a step, none padded; bf16, ZeRO-2 unless named. "
        "Model FLOPs: the matrix products of forward and backward over all views of a row (one in MLM, "
        "four in DGA), attention's over the whole row, the LM head's at the masked positions; MFU is over "
        f"{found['peak']['flops'] / 1e12:.0f} TFLOP/s ({found['peak']['source']}). Projected: "
        f"{PAPERS_ROWS:,} sequences and, in DGA, importance on {PAPERS_IMPORTANCE_ROWS:,} rows, without "
        "start, evaluation and checkpoints."
    )


def minutes(run: Found) -> float:
    """Projected minutes of the papers' DA-training."""
    seconds = PAPERS_ROWS / run["rows_per_second"]
    if "importance_rows_per_second" in run:
        seconds += PAPERS_IMPORTANCE_ROWS / run["importance_rows_per_second"]
    return float(seconds / 60)


def _machine(found: Found) -> str:
    environment = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return (
        f"{', '.join(environment['devices'])}; {found['driver']}; CUDA {environment['cuda']}, NCCL "
        f"{environment['nccl']}, {versions}; commit {environment['git_commit']}. A large bf16 product "
        f"reached {found['measured_flops'] / 1e12:.0f} TFLOP/s on it."
    )


def _table(*columns: str) -> list[str]:
    return [_row(*columns), "|---" * len(columns) + "|"]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _targets(shapes: Mapping[str, Found]) -> Iterator[str]:
    yield from _table("target", "measured", "met")
    for shape, name, figure, limit, words in TARGETS:
        run = shapes.get(shape, {}).get("runs", {}).get(name)
        if run is None:
            yield _row(words, "no", "unknown")
        elif figure == "mfu":
            yield _row(words, f"{run['mfu']:.1%}", "yes" if run["mfu"] >= limit else "no")
        else:
            yield _row(words, f"{minutes(run):.1f} min", "yes" if minutes(run) <= limit else "no")


def _runs(shapes: Mapping[str, Found]) -> Iterator[str]:
    yield from _table(
        "shape", "run", "rows in a pass", "step, ms", "tokens/s", "MFU", "memory, GiB (reserved)",
        "importance, rows/s", "projected, minutes",
    )  # fmt: skip
    for shape, found in shapes.items():
        for name, run in found["runs"].items():
            importance = run.get("importance_rows_per_second")
            yield _row(
                shape,
                name,
                str(run["micro_batch"]),
                _spread([1e3 * s for s in run["seconds"]]),
                f"{run['tokens_per_second']:,.0f}",
                f"{run['mfu']:.1%}",
                f"{run['memory_gib']:.1f} ({run['reserved_gib']:.1f})",
                f"{importance:,.0f}" if importance else "-",
                f"{minutes(run):.1f}",
            )
        for trainer in found.get("trainer", ()):
            name = f"transformers' Trainer, MLM, step of {trainer['rows']} rows"
            if "seconds" not in trainer:
                yield _row(shape, name, str(trainer["rows"]), "out of memory or failed", *["-"] * 5)
                continue
            rate = trainer["rows"] / statistics.median(trainer["seconds"])
            yield _row(
                shape,
                name,
                str(trainer["rows"]),
                f"{1e3 * statistics.median(trainer['seconds']):.1f}",
                f"{rate * trainer['sequence_length']:,.0f}",
                *["-"] * 3,
                f"{minutes({'rows_per_second': rate}):.1f}",
            )


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _sweeps(shapes: Mapping[str, Found]) -> Iterator[str]:
    yield from _table("shape", "method", "rows in a pass", "tokens/s", "MFU", "memory, GiB")
    for shape, found in shapes.items():
        for method, tried in found["sweeps"].items():
            for size in tried:
                rows = str(size["micro_batch"])
                if "mfu" not in size:
                    yield _row(shape, method, rows, "out of memory", "-", "-")
                    continue
                rate, memory = f"{size['tokens_per_second']:,.0f}", f"{size['memory_gib']:.1f}"
                yield _row(shape, method, rows, rate, f"{size['mfu']:.1%}", memory)


def _traces(shapes: Mapping[str, Found]) -> Iterator[str]:
    for shape, found in shapes.items():
        for name, trace in found["traces"].items():
            groups = ", ".join(f"{group} {share:.1%}" for group, share in trace["groups"].items())
            yield (
                f"{shape}, {name}, {trace['steps']} steps traced: {trace['span']:.1f} ms, the device idle "
                f"for {trace['idle']:.2%} of it, at most {trace['longest_gap']:.2f} ms at a time. "
                f"Busy with: {groups}."
            )
            lines = _table("kernel", "calls a step", "ms a step", "share")
            for kernel, calls, spent in trace["kernels"]:
                short = kernel.replace("|", "/")[:NAME_LENGTH]
                share = spent / (trace["span"] * (1 - trace["idle"]))
                a_step = f"{calls / trace['steps']:g}", f"{spent / trace['steps']:.2f}"
                lines.append(_row(f"`{short}`", *a_step, f"{share:.1%}"))
            yield "\n".join(lines)
            places = ", ".join(f"`{place}` {times}" for place, times in trace["waits"].items())
            yield f"Where the host waits for the device in a step, and how often: {places or 'nowhere'}."


def _programs(shapes: Mapping[str, Found]) -> Iterator[str]:
    for shape, found in shapes.items():
        if program := found.get("program"):
            yield (
                f"The real program (`launchers/dga_train.py`, dga update, {shape}, every step logged), "
                f"median of {program['steps']} steps: {1e3 * program['step_seconds']:.1f} ms, "
                f"{program['tokens_per_second']:,.0f} tokens/s, MFU {program['mfu']:.1%}, waiting for data "
                f"{program['data_wait_seconds'] / program['step_seconds']:.2%}; {program['wall']:.0f} s from "
                f"start to end with importance on {program['importance_rows']} rows, checkpoint and model."
            )


def _repeats(shapes: Mapping[str, Found]) -> Iterator[str]:
    for shape, found in shapes.items():
        if repeat := found.get("repeat"):
            first = repeat["first_difference"]
            losses = "equal bit for bit" if first is None else f"different from step {first} on"
            model = "the same" if repeat["same_model"] else "different"
            seconds, plain = repeat["step_seconds"], found["program"]["step_seconds"]
            yield (
                f"Two runs with `--deterministic true` ({shape}): losses and norms of {repeat['steps']} "
                f"steps {losses}, models {model}; {1e3 * seconds:.1f} ms a step, {seconds / plain:.2f} of "
                "that without the flag."
            )


def _failures(shapes: Mapping[str, Found]) -> Iterator[str]:
    lines = [
        f"- {shape}, {what}: {why}"
        for shape, found in shapes.items()
        for what, why in found["failed"].items()
    ]
    if lines:
        yield "\n".join(["Not measured:", *lines])
