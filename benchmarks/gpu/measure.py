"""One shape on one GPU: the best batch by a sweep, then the steps of each method, its importance, its trace.

    python -m benchmarks.gpu.measure PLAN.json

A process of its own, so that each shape starts on an empty device. What fails is written down in place of its
figures, and the next thing is measured. The trainers are those of the real program, as its loop calls them.
"""

import dataclasses
import gc
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.common import ROOT
from benchmarks.gpu.trace import record, waits
from dga_scale.config.parsing import read_config
from dga_scale.corpus.loading.streams import EvalBatches, StepBatches
from dga_scale.launch.preemption import StopConsensus
from dga_scale.launch.world import Cluster, join_cluster
from dga_scale.logging.environment import describe_environment, device_name
from dga_scale.logging.quiet import quiet_libraries
from dga_scale.logging.run_log import open_log
from dga_scale.logging.throughput import device_peak, measured_flops, memory_gib, wait_for
from dga_scale.objectives.flops import step_flops
from dga_scale.preservation.importance import measure_importance
from dga_scale.train.inputs import check_inputs
from dga_scale.train.protection import protect
from dga_scale.train.seeds import IMPORTANCE_STREAM, seed_everything
from dga_scale.train.trainer import Trainer
from dga_scale.zero.optimizer_hooks import step_was_refused

T = TypeVar("T")

RISES = 1.02
"""A larger batch has to be faster by so much to be taken."""
TRACED_STEPS = 2


@dataclass(frozen=True)
class Plan:
    """What to measure; as JSON between the processes.

    Attributes:
        model, corpus: folders.
        folder: for what runs write.
        result: file for what was found.
        global_batch, micro_batches, steps, rounds, warm_up, importance_rows, stages: see ``world.Scale``.
        settings: of every run, on top of the benchmark's own.
        until: ``time.time()`` after which nothing more is begun.

    """

    model: str
    corpus: str
    folder: str
    result: str
    global_batch: int
    micro_batches: dict[str, list[int]]
    steps: int
    rounds: int
    warm_up: int
    importance_rows: int
    stages: list[int]
    settings: list[str]
    until: float


class Bench:
    """Measures a shape; what it has found so far is in ``found``, plain data."""

    def __init__(self, plan: Plan, cluster: Cluster) -> None:
        self.plan, self.cluster, self.device = plan, cluster, cluster.device
        peak = device_peak(self.device, torch.bfloat16)
        self.peak = peak.flops
        self.found: dict[str, Any] = {
            "peak": asdict(peak),
            "measured_flops": measured_flops(self.device, torch.bfloat16),
            "driver": _driver(),
            "environment": describe_environment(
                launcher=cluster.launcher, devices=[device_name(self.device)], hosts=[""]
            ),
            "sweeps": {},
            "runs": {},
            "traces": {},
            "failed": {},
        }
        self.sizes: dict[str, int] = {}
        """Rows in a pass, by method; as swept."""
        self._save()

    def measure(self) -> dict[str, Any]:
        """Everything, the most wanted first."""
        for method, mask in (("mlm", None), ("dga", "update")):
            self._try(f"{method}, sweep", partial(self.sweep, method, mask))
        if "mlm" in self.sizes:
            flags = self.flags("mlm", None, self.sizes["mlm"])
            self._try("mlm", partial(self.run, "mlm", flags, traced=True))
        if "dga" in self.sizes:
            for mask in ("update", "gradient"):
                name, flags = f"dga {mask}", self.flags("dga", mask, self.sizes["dga"])
                self._try(name, partial(self.run, name, flags, traced=mask == "update"))
            self._variants(self.sizes["dga"])
        return self.found

    def _variants(self, size: int) -> None:
        """Other ways to run DGA with masks on the update, beside ZeRO-2 and SDPA."""
        variants = {f"ZeRO-{stage}": self.flags("dga", "update", size, stage) for stage in self.plan.stages}
        if importlib.util.find_spec("flash_attn"):
            flags = self.flags("dga", "update", size)
            variants["flash_attention_2"] = [*flags, "--attn_implementation", "flash_attention_2"]
        for name, flags in variants.items():
            self._try(f"dga update, {name}", partial(self.run, f"dga update, {name}", flags))

    def flags(self, method: str, mask: str | None, size: int, stage: int = 2) -> list[str]:
        """Settings of a run with ``size`` rows in a pass."""
        plan = self.plan
        masks = ["--soft_mask", mask, "--importance_samples", str(size)] if mask else []
        return [
            *("--ds_config", str(ROOT / "ds_configs" / f"zero{stage}.json")),
            *("--model", plan.model, "--corpus", plan.corpus, "--method", method, *masks),
            *("--global_batch_size", str(max(size, plan.global_batch))),
            *("--per_device_train_batch_size", str(size), "--resume", "never"),
            *plan.settings,
        ]

    def sweep(self, method: str, mask: str | None) -> None:
        """Find the rows in a pass with which most tokens are read in a second, one pass in a step."""
        sizes = self.plan.micro_batches[method]
        tried: list[dict[str, Any]] = []
        self.found["sweeps"][method] = tried

        def go_up(trainer: Trainer) -> int:
            best = (0.0, 0)
            for size in sizes:
                resolved = dataclasses.replace(
                    trainer.inputs.resolved,
                    micro_batch_size=size,
                    global_batch_size=size,
                    accumulation_steps=1,
                )
                trainer.inputs = dataclasses.replace(trainer.inputs, resolved=resolved)
                try:
                    seconds = self._seconds(trainer, rounds=2)
                except torch.OutOfMemoryError:
                    tried.append({"micro_batch": size})
                    break
                figures = self._figures(trainer, seconds)
                tried.append({"micro_batch": size, **figures})
                if figures["tokens_per_second"] < best[0] * RISES:
                    break
                best = (figures["tokens_per_second"], size)
            if not best[1]:
                raise RuntimeError(f"{sizes[0]} rows in a pass do not fit into the GPU's memory")
            return best[1]

        flags = self.flags(method, mask, sizes[0])
        flags[flags.index("--global_batch_size") + 1] = str(sizes[0])
        self.sizes[method] = self._with_trainer(flags, go_up)

    def run(self, name: str, flags: list[str], traced: bool = False) -> None:
        """Figures of steps of the whole global batch, as a run has them."""

        def steps(trainer: Trainer) -> None:
            resolved = trainer.inputs.resolved
            figures = self._figures(trainer, self._seconds(trainer, self.plan.rounds))
            figures |= {"micro_batch": resolved.micro_batch_size, "global_batch": resolved.global_batch_size}
            figures |= {"zero_stage": resolved.zero_stage, "refused_steps": trainer.engine.skipped_steps}
            if trainer.method.kinds:
                figures["importance_rows_per_second"] = self._importance_rate(trainer)
            self.found["runs"][name] = figures
            if traced:
                self.found["traces"][name] = self._trace(trainer)

        self._with_trainer(flags, steps)

    def _with_trainer(self, flags: list[str], use: Callable[[Trainer], T]) -> T:
        """Build what trains, protect what has to be protected, and take it off the device in the end."""
        folder = Path(self.plan.folder, f"{time.time_ns()}")
        config = read_config([*flags, "--output_dir", str(folder)])
        inputs = check_inputs(config, self.cluster)  # it wants a new folder
        with open_log(folder, self.cluster.rank, config.optimization.max_steps) as log:
            trainer = Trainer(inputs, self.cluster, log)
            try:
                protect(trainer)
                return use(trainer)
            finally:
                trainer.engine.destroy()

    @contextmanager
    def _stepping(self, trainer: Trainer) -> Iterator[Callable[[int], None]]:
        """Give a function that takes so many steps, as the loop takes them, on batches prepared ahead."""
        consensus = StopConsensus(self.cluster)
        with trainer.stream(0) as stream:
            batches = iter(stream)

            def step(number: int) -> None:
                for _ in range(number):
                    self.last: StepBatches = next(batches)
                    terms, _ = trainer.step(self.last)
                    consensus.average(terms, False)
                    step_was_refused(trainer.engine)

            yield step

    def _seconds(self, trainer: Trainer, rounds: int) -> list[float]:
        """Seconds of a step: means over as many as the plan says, one for each round."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = []
        with self._stepping(trainer) as step:
            step(self.plan.warm_up)
            for _ in range(rounds):
                wait_for(self.device)
                started = time.perf_counter()
                step(self.plan.steps)
                wait_for(self.device)
                seconds.append((time.perf_counter() - started) / self.plan.steps)
        return seconds

    def _trace(self, trainer: Trainer) -> dict[str, Any]:
        with self._stepping(trainer) as step:
            step(1)
            trace = record(lambda: step(TRACED_STEPS), self.device)
            places = waits(lambda: step(1), self.device)
        return {**trace._asdict(), "steps": TRACED_STEPS, "waits": dict(places.most_common())}

    def _figures(self, trainer: Trainer, seconds: list[float]) -> dict[str, Any]:
        """Rates at the median of the rounds, and memory since they began."""
        rows = trainer.inputs.resolved.global_batch_size
        flops = step_flops(trainer.method, trainer.flops, self.last.shape)
        median = statistics.median(seconds)
        reserved = torch.cuda.max_memory_reserved(self.device) / 2**30 if self.device.type == "cuda" else 0.0
        return {
            "seconds": seconds,
            "tokens_per_second": sum(self.last.tokens_per_source) / median,
            "rows_per_second": rows / median,
            "mfu": flops / (median * self.peak),
            "views": len(trainer.model.views),
            "tflop": flops / 1e12,
            "memory_gib": memory_gib(self.device),
            "reserved_gib": reserved,
        }

    def _importance_rate(self, trainer: Trainer) -> float:
        """Rows in a second of the importance pass that a run makes before it trains, by proxy KL."""
        inputs, rows = trainer.inputs, self.plan.importance_rows
        batches = EvalBatches(
            inputs.corpus,
            inputs.masking,
            batch_size=inputs.resolved.micro_batch_size,
            rank=0,
            world_size=1,
            max_rows=rows,
        )
        seed_everything(0, IMPORTANCE_STREAM, 0, 0)
        wait_for(self.device)
        started = time.perf_counter()
        measure_importance(
            trainer.engine.module,
            (batch.to(self.device) for batch in batches),
            kinds=trainer.method.kinds,
        )
        wait_for(self.device)
        return min(rows, len(inputs.corpus)) / (time.perf_counter() - started)

    def _try(self, name: str, piece: Callable[[], object]) -> None:
        """Run a piece; what goes wrong is written down, and the rest is still measured."""
        if time.time() > self.plan.until:
            self.found["failed"][name] = "no time was left"
            return
        started = time.perf_counter()
        try:
            piece()
        except Exception as error:
            traceback.print_exc()
            self.found["failed"][name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        gc.collect()
        left = 0.0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            left = torch.cuda.memory_allocated(self.device) / 2**30
        print(
            f"-- {name}: {time.perf_counter() - started:.1f} s; left on the device: {left:.2f} GiB",
            flush=True,
        )
        self._save()  # the next piece may end the process

    def _save(self) -> None:
        Path(self.plan.result).write_text(json.dumps(self.found, indent=1))


def _driver() -> str:
    """Driver, memory, power limit and highest clock of the GPU, as nvidia-smi says."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    asked = "driver_version,memory.total,power.limit,clocks.max.sm"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return f"driver, memory, power limit, clock: {said.strip()}"


def main() -> None:
    """Measure what PLAN.json says."""
    quiet_libraries()
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text()))
    with join_cluster() as cluster:
        Bench(plan, cluster).measure()


if __name__ == "__main__":
    main()
