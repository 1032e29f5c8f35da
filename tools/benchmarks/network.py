"""Our denoisers beside a plain textbook implementation: time, memory, outputs."""

from collections.abc import Callable, Iterator, Mapping
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import Case, Side, Sizes, build_case
from benchmarks.table import Row, bar_of, format_row, verdict, write
from benchmarks.timing import Ratio, interleaved, peak_bytes, speed
from mmsora.engine.hooks.ema_hook import DenoiserEMAHook

__all__ = ["ROWS", "benchmark_network"]

DECAY = 0.9999
TOLERANCE = 1e-5  # of the outputs of ours and the textbook's
QUIET = (0.97, 1.03)  # the textbook beside itself, in a run that can be trusted


Seconds = dict[str, list[float]]  # of one call in each round, by network


def in_turn(functions: Mapping[str, Callable[[], object]], options: Any) -> Seconds:
    """Time ``ours``, ``textbook`` and perhaps ``diffusers``; and the textbook ``again``."""
    functions = {**functions, "again": functions["textbook"]}
    return interleaved(functions, options.rounds, options.device)


def compare(case: Case, what: str, spent: Seconds, device: str) -> list[Row]:
    """Rows of ours against the textbook's, the textbook's against diffusers' and itself."""

    def row(pair: str, of: str, against: str, bar: str = "") -> Row:
        note = " : ".join(f"{median(spent[name]) * 1e3:.2f} ms" for name in (of, against))
        return Row(case.name, what, pair, speed(spent[of], spent[against]), bar, note)

    rows = [row("ours / textbook", "ours", "textbook", bar_of(what, case.name, device))]
    if "diffusers" in spent:
        rows.append(row("textbook / diffusers", "textbook", "diffusers", "median >= 0.95"))
    return [*rows, row("A/A", "again", "textbook")]


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
        return compare(case, what, in_turn(functions, options), device)

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
    return compare(case, what, in_turn(functions, options), options.device)


def hook_update(model: nn.Module) -> Callable[[], None]:
    """A call that updates our hook's average of a model."""
    hook = DenoiserEMAHook(decay=DECAY, warmup=False)
    wrapper = SimpleNamespace(stepped=True)
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
    return compare(case, what, in_turn(functions, options), options.device)


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
    spent = in_turn(functions, options)
    measured = measured_tflops(device)
    unit = "images/s" if case.name.startswith("DiT") else "videos/s"
    notes = []
    for name in functions:
        seconds = median(spent[name])
        rate = flops / seconds
        note = f"{name} {case.batch / seconds:.2f} {unit}, {peaks[name] / 2**30:.2f} GiB, MFU "
        note += f"{rate / measured:.1%} of {measured:.2f} TFLOP/s measured"
        if options.peak_tflops:
            note += f", {rate / options.peak_tflops:.1%} of {options.peak_tflops:g} given"
        notes.append(note)
    first, *others = compare(case, what, spent, device)
    return [first._replace(note="; ".join(notes)), *others]


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
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --device cpu measures this machine")
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
            "times as fast as itself; the figures of this run are not to be trusted"
        )
    if options.out:
        write(rows, options, bool(noisy))
    return int(any(row.what == "outputs" and verdict(row) != "ok" for row in rows))
