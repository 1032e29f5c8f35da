"""Our denoisers beside a plain textbook implementation: time, memory, outputs."""

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import Case, Side, Sizes, build_case
from benchmarks.table import Row, bar_of, format_row, verdict, write
from benchmarks.timing import Ratio, interleaved, median_interval, peak_bytes, speed
from mmsora.engine.hooks.ema_hook import DenoiserEMAHook

__all__ = ["ROWS", "benchmark_network"]

DECAY = 0.9999
TOLERANCE = 1e-5  # of the outputs of ours and the textbook's
QUIET = (0.97, 1.03)  # the textbook beside itself, in a run that can be trusted


def compare(
    model: str, what: str, functions: Mapping[str, Callable[[], object]], rounds: int, device: str
) -> list[Row]:
    """Rows of ours against the textbook's, the textbook's against diffusers' and itself.

    Args:
        model: The network.
        what: What is measured.
        functions: ``ours``, ``textbook`` and perhaps ``diffusers``.
        rounds: How often.
        device: Where.

    Returns:
        The rows.
    """
    spent = interleaved({**functions, "again": functions["textbook"]}, rounds, device)
    base = spent["textbook"]
    ms = {name: f"{median_interval(times).median * 1e3:.2f} ms" for name, times in spent.items()}

    def row(pair: str, ratio: Ratio, bar: str, *names: str) -> Row:
        return Row(model, what, pair, ratio, bar, " : ".join(ms[name] for name in names))

    rows = [
        row(
            "ours / textbook",
            speed(spent["ours"], base),
            bar_of(what, model, device),
            "ours",
            "textbook",
        )
    ]
    if "diffusers" in spent:
        ratio = speed(base, spent["diffusers"])
        rows.append(row("textbook / diffusers", ratio, "median >= 0.95", "textbook", "diffusers"))
    return [*rows, row("A/A", speed(spent["again"], base), "", "again", "textbook")]


def inference(side: Side, device: str) -> Callable[[], object]:
    """A forward pass."""
    return torch.no_grad()(side.forward)


def training(side: Side, device: str, dtype: torch.dtype | None = None) -> Callable[[], object]:
    """A forward and a backward pass, under autocast to ``dtype`` if there is one."""

    def run() -> None:
        side.model.zero_grad()
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            out = side.forward()
        out.float().square().mean().backward()

    return run


def bf16_training(side: Side, device: str) -> Callable[[], object]:
    """``training`` under autocast to bfloat16."""
    return training(side, device, torch.bfloat16)


def timed(make: Callable[[Side, str], Callable[[], object]]) -> Callable[..., list[Row]]:
    """Rows of what ``make`` makes of every network."""

    def rows(case: Case, what: str, options: Any) -> list[Row]:
        device = options.device
        functions = {name: make(side, device) for name, side in case.sides.items()}
        return compare(case.name, what, functions, options.rounds, device)

    return rows


def memory(case: Case, what: str, options: Any) -> list[Row]:
    """Rows of the most that a forward and a backward pass in float32 hold at once."""
    peaks = {}
    for name in ("ours", "textbook"):
        side = case.sides[name]
        training(side, options.device)()  # what is made once is made
        side.model.zero_grad()
        peaks[name] = peak_bytes(training(side, options.device), options.device)
        side.model.zero_grad()
    ratio = peaks["ours"] / peaks["textbook"]
    note = " : ".join(f"{peak / 2**20:.1f} MiB" for peak in peaks.values())
    bar = bar_of(what, case.name, options.device)
    return [Row(case.name, what, "ours / textbook", Ratio(ratio, ratio, ratio), bar, note)]


def with_gradients(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters, with gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def optimizer(case: Case, what: str, options: Any) -> list[Row]:
    """Rows of an optimizer step: fused, as in our configs, against AdamW's default."""
    sides = case.sides
    fused = torch.optim.AdamW(with_gradients(sides["ours"].model), lr=0.0, fused=True)
    default = torch.optim.AdamW(with_gradients(sides["textbook"].model), lr=0.0)
    functions = {"ours": fused.step, "textbook": default.step}
    return compare(case.name, what, functions, options.rounds, options.device)


def hook_update(model: nn.Module) -> Callable[[], None]:
    """A call that updates our hook's average of a model."""
    hook = DenoiserEMAHook(decay=DECAY, warmup=False)
    wrapper = SimpleNamespace(_accumulative_counts=1)
    runner: Any = SimpleNamespace(
        model=SimpleNamespace(denoiser=model), optim_wrapper=wrapper, iter=0, max_iters=1
    )
    hook.before_train(runner)
    return lambda: hook.after_train_iter(runner, 0)


def loop_update(model: nn.Module) -> Callable[[], None]:
    """A call that updates an average one parameter after the other, as the public trainers do."""
    weights = dict(model.named_parameters())
    average = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update() -> None:
        for name, weight in weights.items():
            average[name].mul_(DECAY).add_(weight.data, alpha=1 - DECAY)

    return update


def ema(case: Case, what: str, options: Any) -> list[Row]:
    """Rows of an update of the average: our hook against a loop."""
    ours, theirs = case.sides["ours"].model, case.sides["textbook"].model
    functions = {"ours": hook_update(ours), "textbook": loop_update(theirs)}
    return compare(case.name, what, functions, options.rounds, options.device)


def step(case: Case, what: str, options: Any) -> list[Row]:
    """Rows of training steps in bfloat16: passes, optimizer and average, each in its own way."""
    functions, peaks, device = {}, {}, options.device
    for name in ("ours", "textbook"):
        side = case.sides[name]
        trained = [p for p in side.model.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(trained, lr=1e-6, fused=name == "ours" or None)
        update = (hook_update if name == "ours" else loop_update)(side.model)
        passes = bf16_training(side, device)

        def run(passes: Any = passes, adamw: Any = adamw, update: Any = update) -> None:
            passes()
            adamw.step()
            update()

        run()
        side.model.zero_grad()
        held = 4 * sum(p.nbytes for p in trained)  # weights, both moments and the average
        peaks[name] = held + peak_bytes(run, device)
        functions[name] = run
    flops = 3 * forward_flops(case.sides["ours"]) / 1e12
    rows = compare(case.name, what, functions, options.rounds, device)
    measured = measured_tflops(device)
    time = [float(text.split()[0]) / 1e3 for text in rows[0].note.split(" : ")]
    unit = "images/s" if case.name.startswith("DiT") else "videos/s"
    notes = []
    for name, spent in zip(functions, time, strict=True):
        rate = flops / spent
        note = f"{name} {case.batch / spent:.2f} {unit}, {peaks[name] / 2**30:.2f} GiB, MFU "
        note += f"{rate / measured:.1%} of {measured:.2f} TFLOP/s measured"
        if options.peak_tflops:
            note += f", {rate / options.peak_tflops:.1%} of {options.peak_tflops:g} given"
        notes.append(note)
    return [rows[0]._replace(note="; ".join(notes)), *rows[1:]]


def forward_flops(side: Side) -> int:
    """Floating point operations of a forward pass; a backward pass takes twice as many."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        side.forward()
    return counter.get_total_flops()


def measured_tflops(device: str) -> float:
    """What the device reaches in a large product of bfloat16 matrices."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    times = interleaved({"product": lambda: a @ a}, 9, device)["product"]
    return 2 * n**3 / min(times) / 1e12


ROWS: dict[str, Callable[[Case, str, Any], list[Row]]] = {
    "inference": timed(inference),
    "train-fp32": timed(training),
    "train-bf16": timed(bf16_training),
    "memory": memory,
    "optimizer": optimizer,
    "ema": ema,
    "step": step,
}


def measure(options: Any) -> Iterator[Row]:
    """All rows, one after the other."""
    for name in options.models:
        sizes = Sizes(options.depth, options.batch, options.frames, options.side, options.device)
        case = build_case(name, sizes)
        difference = Ratio(*[case.difference] * 3)
        bar = f"median <= {TOLERANCE}"
        yield Row(name, "outputs", "ours - textbook", difference, bar, f"batch {case.batch}")
        for what in options.what:
            yield from ROWS[what](case, what, options)


def benchmark_network(options: Any) -> int:
    """Measure, print a table and write it.

    Args:
        options: The command line.

    Returns:
        The exit status: 1 if the outputs differ.
    """
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # on both sides
    torch.backends.cudnn.allow_tf32 = False
    depth = f"{options.depth} blocks" if options.depth else "all blocks"
    print(
        f"PyTorch {torch.__version__}, {options.device}, {depth}, {options.rounds} rounds. "
        "Speed of the first over the second;\nmemory and outputs as ratio and difference. "
        "Median [95 % interval] bar"
    )
    rows = []
    for row in measure(options):
        print(format_row(row), flush=True)
        rows.append(row)
    noisy = [
        row for row in rows if row.pair == "A/A" and not QUIET[0] <= row.ratio.median <= QUIET[1]
    ]
    for row in noisy:
        print(
            f"WARNING: noisy run: {row.model} {row.what}: the textbook is {row.ratio.median:.3f} "
            "times as fast as itself; trust none of these figures"
        )
    if options.out:
        write(rows, options, bool(noisy))
    return int(any(row.what == "outputs" and verdict(row) != "ok" for row in rows))
