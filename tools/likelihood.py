"""Measure how likely a model finds data, in bits for each number of their latents.

python tools/likelihood.py --checkpoint work_dirs/latte_moving_digits/iter_4000 --split test
"""

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsora.utils.cli_options import key_values
from mmsora.utils.user_error import UserError, user_errors_as_one_line

if TYPE_CHECKING:
    from mmengine.config import Config
    from torch import Tensor
    from torch.utils.data import DataLoader

    from mmsora.models.latent_diffusion import LatentDiffusion

SOLVERS = ("euler", "midpoint", "heun2", "rk4", "dopri5")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure how likely a model finds data, in bits for each number of their "
        "latents: bits of pixels only where there is no VAE. Latents are continuous, so that the "
        "figure may be negative. Less is better."
    )
    parser.add_argument(
        "config", nargs="?", help="path or name of a config; default the checkpoint's own"
    )
    parser.add_argument("--checkpoint", required=True, help="the weights")
    parser.add_argument("--split", help="of the config's dataset; default the one trained on")
    parser.add_argument(
        "--num-samples", type=int, default=256, help="how many, spread evenly over the dataset"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="how many at a time")
    parser.add_argument("--steps", type=int, help="of the grid; default as the config says")
    parser.add_argument(
        "--method",
        choices=("ode", "bound"),
        default="ode",
        help="the density by the probability flow, for continuous time, or the variational "
        "bound, with data rounded to 256 levels in [-1, 1]",
    )
    parser.add_argument("--solver", choices=SOLVERS, default="heun2", help="of the flow")
    parser.add_argument("--seed", type=int, default=0, help="of noise and probes")
    parser.add_argument("--out", default="likelihood.json", help="file to write to")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--no-ema", action="store_true", help="the raw weights, not the average")
    parser.add_argument(
        "--cfg-options", nargs="+", type=key_values, default=[], metavar="KEY=VALUE"
    )
    args = parser.parse_args(argv)
    if args.num_samples < 2:
        parser.error(f"--num-samples must be at least 2 for an error, got {args.num_samples}")
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    return args


def prepare(args: argparse.Namespace) -> "Config":
    """The config of model and data, with the command line applied.

    Args:
        args: The command line.

    Returns:
        The config.
    """
    from mmsora.apis.build import config_of
    from mmsora.utils.checkpoint import load_checkpoint
    from mmsora.utils.config_check import apply_overrides
    from mmsora.utils.config_names import load_config

    if args.config is None:
        cfg = config_of(load_checkpoint(args.checkpoint, parts=()), args.checkpoint)
    else:
        cfg = load_config(args.config)
    if "train_dataloader" not in cfg:
        raise UserError("the config has no train_dataloader, hence no data to measure")
    overrides: dict[str, Any] = dict(args.cfg_options)
    if args.steps is not None:
        overrides["model.diffusion.grid.num_steps"] = args.steps
    if args.split is not None:
        overrides["train_dataloader.dataset.split"] = args.split
    apply_overrides(cfg, overrides)
    return cfg


def loader(cfg: "Config", args: argparse.Namespace) -> "DataLoader":
    """The samples asked for, in batches.

    Args:
        cfg: The config.
        args: The command line.

    Returns:
        Batches for the model's data preprocessor.
    """
    from mmengine.dataset import pseudo_collate
    from torch.utils.data import DataLoader, Subset

    from mmsora.registry import DATASETS
    from mmsora.utils.config_check import user_errors

    with user_errors():
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    if args.num_samples > len(dataset):
        raise UserError(f"--num-samples {args.num_samples}: the dataset has {len(dataset)}")
    places = [i * len(dataset) // args.num_samples for i in range(args.num_samples)]
    return DataLoader(
        Subset(dataset, places),
        args.batch_size,
        num_workers=cfg.train_dataloader.get("num_workers", 0),
        collate_fn=pseudo_collate,
    )


def measure(
    model: "LatentDiffusion", batch: dict[str, Any], args: argparse.Namespace
) -> tuple["Tensor", "Tensor"]:
    """The figures of one batch.

    Args:
        model: The model.
        batch: What the loader gave.
        args: The command line.

    Returns:
        Bits for each dimension (B,), and the latents that they are of.
    """
    import torch

    from mmsora.diffusion.bound import variational_bound
    from mmsora.diffusion.likelihood import bits_per_dimension, log_likelihood
    from mmsora.diffusion.ode import DormandPrince, RungeKutta
    from mmsora.utils.draws import Draws

    data = model.data_preprocessor(batch)
    samples = data["data_samples"]
    draws = Draws(args.seed, [sample.index for sample in samples])
    with torch.no_grad():
        x0 = model.vae.encode(data["inputs"], draws).float()
    cond = {} if model.conditioner is None else model.conditioner(samples, None)
    cond = {key: value.to(x0.device) for key, value in cond.items()}
    parts = model.diffusion, model.denoiser, x0, cond, draws
    if args.method == "bound":
        return variational_bound(*parts).total, x0
    if args.solver == "dopri5":
        found = log_likelihood(*parts, solver=DormandPrince(), trace="fixed")
    else:
        found = log_likelihood(*parts, solver=RungeKutta(args.solver))
    return bits_per_dimension(found.log_p, x0), x0


def report(
    bits: list[float], shape: tuple[int, ...], args: argparse.Namespace, cfg: "Config"
) -> None:
    """Prints the figures and writes them to a file.

    Args:
        bits: Of each sample.
        shape: Of a latent.
        args: The command line.
        cfg: The config.
    """
    from mmsora.utils.atomic import write_json

    mean = sum(bits) / len(bits)
    spread = sum((value - mean) ** 2 for value in bits) / (len(bits) - 1)
    error, nats = math.sqrt(spread / len(bits)), math.prod(shape) * math.log(2)
    dataset = cfg.train_dataloader.dataset
    write_json(
        Path(args.out),
        {
            "bits_per_dim": {"mean": mean, "standard_error": error},
            "of": "latents",
            "latent_shape": list(shape),
            "num_samples": len(bits),
            "method": args.method,
            "solver": args.solver if args.method == "ode" else None,
            "steps": cfg.model.diffusion.grid.get("num_steps"),
            "split": dataset.get("split"),
            "seed": args.seed,
            "checkpoint": str(args.checkpoint),
            "ema": not args.no_ema,
            "samples": bits,
        },
    )
    what = "negative log-likelihood" if args.method == "ode" else "variational bound of it"
    print(f"{what}, {len(bits)} samples, latents of {' x '.join(map(str, shape))} numbers")
    print(f"{'':10}{'mean':>12}{'+-':>12}")
    print(f"{'bits/dim':10}{mean:12.4f}{error:12.4f}")
    print(f"{'nats':10}{mean * nats:12.1f}{error * nats:12.1f}")


def main(argv: list[str] | None = None) -> None:
    """Measure."""
    args = parse_args(argv)
    with user_errors_as_one_line():
        cfg = prepare(args)
        from mmsora.apis import Inferencer
        from mmsora.utils.config_check import user_errors

        model = Inferencer(args.checkpoint, cfg, args.device, use_ema=not args.no_ema).model
        bits: list[float] = []
        start = time.perf_counter()
        for batch in loader(cfg, args):
            with user_errors():
                values, x0 = measure(model, batch, args)
            bits += values.tolist()
            spent = time.perf_counter() - start
            print(f"{len(bits)} of {args.num_samples} samples, {spent:.0f} s", flush=True)
        report(bits, tuple(x0.shape[1:]), args, cfg)


if __name__ == "__main__":
    main()
