"""Encode a config's data once, so that training needs no VAE and no text encoder.

python tools/extract_features.py configs/dit/dit_s2_imagenet_256.py --out data/imagenet_latents
torchrun --nproc_per_node 8 tools/extract_features.py CONFIG --out DIR
"""

import argparse
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsora.utils.cli_options import key_values
from mmsora.utils.user_error import UserError, user_errors_as_one_line

if TYPE_CHECKING:
    from mmengine.config import Config
    from torch import Tensor

    from mmsora.utils.feature_store import FeatureWriter

# What tells a process its share, of each launcher.
SHARES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
# Settings of a dataset that its samples do not depend on.
NOT_KEPT = ("data_root", "on_error", "lazy_init", "serialize_data", "max_refetch")
PROBES = 8  # samples that are read to see whether the pipeline gives a text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Encode a config's data once, so that training needs no VAE and no text "
        "encoder. What is there already is not made again: start it anew wherever it was stopped."
    )
    parser.add_argument("config", help="path of a config, or the name of one that is shipped")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--batch-size", type=int, default=16, help="samples encoded at a time")
    parser.add_argument("--workers", type=int, help="processes that read; default the config's")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument(
        "--precision", choices=("off", "bf16"), default="off", help="of the VAE, by autocast"
    )
    parser.add_argument(
        "--clips", type=int, default=1, help="epochs whose random clips and crops are kept"
    )
    parser.add_argument("--rows-per-shard", type=int, default=1000, help="samples in a file")
    parser.add_argument(
        "--layout",
        choices=("shards", "npy"),
        default="shards",
        help="npy: imagenet256_features/N.npy and imagenet256_labels/N.npy, a latent drawn once",
    )
    parser.add_argument("--name", default="imagenet256", help="of the folders of --layout npy")
    parser.add_argument(
        "--share", metavar="K/N", help="process K of N, from 0; default as torchrun or Slurm say"
    )
    parser.add_argument("--device", help="default: this process's GPU where there is one")
    parser.add_argument("--verify", action="store_true", help="check what was written, and stop")
    parser.add_argument(
        "--cfg-options", nargs="+", type=key_values, default=[], metavar="KEY=VALUE"
    )
    args = parser.parse_args(argv)
    for name in ("batch_size", "clips", "rows_per_shard"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.layout == "npy" and args.clips > 1:
        parser.error("--layout npy keeps one clip")
    return args


def share_of(text: str | None) -> tuple[int, int]:
    """Which process this is, of how many.

    Args:
        text: ``K/N``, or None to ask the environment.

    Returns:
        Both.

    Raises:
        UserError: There is no such share.
    """
    for rank, world in SHARES:
        if text is None and rank in os.environ and world in os.environ:
            text = f"{os.environ[rank]}/{os.environ[world]}"
    number, slash, total = (text or "0/1").partition("/")
    if not (number.isdigit() and slash and total.isdigit() and int(number) < int(total)):
        raise UserError(f"--share is K/N with K from 0 to N - 1, got {text}")
    return int(number), int(total)


def prepare(args: argparse.Namespace) -> "Config":
    """The config, with the command line applied.

    Args:
        args: The command line.

    Returns:
        The config, checked.

    Raises:
        UserError: It has nothing to encode.
    """
    from mmengine.registry import init_default_scope

    from mmsora.utils.config_check import apply_overrides, check_config
    from mmsora.utils.config_names import load_config

    cfg = load_config(args.config)
    apply_overrides(cfg, dict(args.cfg_options))
    check_config(cfg)
    init_default_scope("mmsora")
    if "train_dataloader" not in cfg or "vae" not in cfg.get("model", {}):
        raise UserError(f"{args.config} has no train_dataloader and model.vae to encode with")
    if cfg.train_dataloader.get("batch_sampler") is not None:
        raise UserError(
            f"{args.config} trains in buckets; a cache has one size: extract with a config of one"
        )
    return cfg


def conditioner_of(cfg: "Config", args: argparse.Namespace) -> Any:
    """A config's conditioner, without its weights.

    Args:
        cfg: The config.
        args: The command line.

    Returns:
        The conditioner, None where nothing that it encodes can be stored.

    Raises:
        UserError: The layout has no place for what it encodes.
    """
    from mmsora.models.conditioners.looking import lookers
    from mmsora.registry import CONDITIONERS

    config = cfg.model.get("conditioner")
    conditioner = CONDITIONERS.build(config) if config else None
    what = "texts" if getattr(conditioner, "takes_text", False) else ""
    what = what or ", ".join(part.field for part in lookers(conditioner))
    if conditioner is None or not what:
        return None
    if args.layout == "npy":
        raise UserError(
            f"--layout npy holds no {what}, which the model is told; take --layout shards"
        )
    return conditioner


def text_encoder_of(conditioner: Any) -> Any:
    """What embeds a conditioner's texts, None where it is told none."""
    return conditioner.encoder if getattr(conditioner, "takes_text", False) else None


def prompts_of(cfg: "Config") -> list[str]:
    """The prompts that the hooks of a config sample."""
    hooks = [*(cfg.get("custom_hooks") or ()), *(cfg.get("default_hooks") or {}).values()]
    found = [prompt for hook in hooks if hook for prompt in hook.get("prompts") or ()]
    return list(dict.fromkeys(found))


def write_texts(writer: "FeatureWriter", encoder: Any, prompts: Sequence[str]) -> None:
    """Write the embeddings of the empty text and of prompts, anew if there are other prompts.

    Args:
        writer: Of the shards.
        encoder: Of the texts.
        prompts: What is sampled while training.
    """
    import torch
    from safetensors.torch import load_file

    from mmsora.utils.feature_store import SHARED

    texts = ["", *(prompt for prompt in prompts if prompt)]
    names = torch.tensor(list(json.dumps(texts).encode()), dtype=torch.uint8)
    path = writer.root / SHARED
    if writer.rank == 0 and path.exists() and not torch.equal(load_file(path)["texts"], names):
        path.unlink()
    with torch.inference_mode():
        made = [encoder([text]) for text in texts]
    writer.write_shared(
        {
            "texts": names,
            "text_embeddings": torch.cat([states for states, _ in made]),
            "text_masks": torch.cat([mask for _, mask in made]),
        }
    )


def take_flip(dataset: Any) -> float:
    """Switch a pipeline's flip off, because both sides are encoded.

    Args:
        dataset: The dataset.

    Returns:
        How often it flips.

    Raises:
        UserError: The flip cannot be told from the rest of the pipeline.
    """
    from mmsora.datasets.transforms.packing import PackVideo
    from mmsora.datasets.transforms.spatial import RandomFlip

    parts = [getattr(dataset, name, None) for name in ("dataset", "videos", "images")]
    for part in [*parts, *getattr(dataset, "datasets", ())]:
        if part is not None and take_flip(part):
            raise UserError(
                f"a {type(dataset).__name__} of datasets that flip has no two sides to encode; "
                "extract each by itself, or without RandomFlip"
            )
    transforms = getattr(getattr(dataset, "pipeline", None), "transforms", [])
    flips = [n for n, transform in enumerate(transforms) if isinstance(transform, RandomFlip)]
    if not flips or getattr(dataset, "test_mode", False):
        return 0.0
    after = transforms[flips[0] + 1 :]
    if len(flips) > 1 or len(after) != 1 or not isinstance(after[0], PackVideo):
        raise UserError("RandomFlip must stand just before PackVideo, to encode both sides")
    flip, prob = transforms[flips[0]], float(transforms[flips[0]].prob)
    flip.prob = 0.0
    return prob


def list_hash(dataset: Any) -> str | None:
    """A hash of a dataset's list, None where it has none."""
    if not hasattr(dataset, "get_data_info"):
        return None
    found = hashlib.sha256()
    for number in range(len(dataset)):
        found.update(json.dumps(dataset.get_data_info(number), default=str).encode())
    return found.hexdigest()


def check_texts(dataset: Any, conditioner: Any) -> None:
    """See that all of a dataset's list have a text, if the model is told texts.

    Args:
        dataset: The dataset. One without a list is not looked at.
        conditioner: Of the model, or None.

    Raises:
        UserError: There are samples without.
    """
    if text_encoder_of(conditioner) is None or not hasattr(dataset, "get_data_info"):
        return
    total = len(dataset)
    without = [n for n in range(total) if dataset.get_data_info(n).get("text") is None]
    # A pipeline may give texts itself, or refuse what has none.
    probed = ((number, dataset[number]["data_samples"]) for number in without[:PROBES])
    found = next((one for one in probed if one[1].get("weight") != 0), None)
    if found is None or found[1].get("text") is not None:
        return
    number, sample = found
    file, advice = caption_list(dataset)
    if len(without) == total:
        advice = advice or f"{type(dataset).__name__} gives no captions; take data that has some"
        raise UserError(f"{file or 'train_dataloader.dataset'}: {advice}")
    raise UserError(
        f"{sample.get('path', f'sample {number}')}: no text to embed, as in {len(without)} of "
        f"{total} samples{' (an empty caption counts as none)' if file else ''}; write captions "
        f"for them, or take them out of {file or 'the dataset'}"
    )


def caption_list(dataset: Any) -> tuple[str, str]:
    """Where a dataset's captions stand, and what to do if there are none.

    Args:
        dataset: The dataset.

    Returns:
        The list and the advice, empty for datasets that have no list of columns.
    """
    from mmsora.datasets.annotated import COLUMNS, AnnotatedVideos
    from mmsora.datasets.records import find_list, read_records

    if not isinstance(dataset, AnnotatedVideos):
        return "", ""
    name = dataset.list_file or find_list(dataset.data_root)
    records = read_records(dataset.data_root, name)
    there = {str(key) for record in records for key in record} - {"_folder"}
    known = [dataset.columns["text"]] if "text" in dataset.columns else COLUMNS["text"]
    empty = [column for column in known if column in there]
    what = f"no caption in its column {empty[0]}, among" if empty else "no caption column among"
    advice = (
        f"{what} {', '.join(sorted(there))}; name one with "
        "train_dataloader.dataset.columns.text=NAME"
    )
    return os.path.join(dataset.data_root, name or ""), advice


def manifest_of(
    cfg: "Config", args: argparse.Namespace, dataset: Any, vae: Any, conditioner: Any, flip: float
) -> dict[str, Any]:
    """What the cache is made of.

    Args:
        cfg: The config.
        args: The command line.
        dataset: Its dataset.
        vae: Its VAE, with its weights.
        conditioner: Its conditioner, with its weights, or None.
        flip: How often the pipeline flips.

    Returns:
        Plain values.

    Raises:
        UserError: ``--clips`` asks for epochs of a dataset that has none.
    """
    from mmsora.models.conditioners.looking import lookers
    from mmsora.utils.config_check import config_dict

    if args.clips > 1 and not getattr(dataset, "takes_epochs", False):
        raise UserError(f"--clips {args.clips}: {type(dataset).__name__} is the same every epoch")
    made_of = config_dict(cfg)["train_dataloader"]["dataset"]
    classes = getattr(dataset, "metainfo", {}).get("classes")
    text, parts = text_encoder_of(conditioner), lookers(conditioner)
    manifest = {
        "layout": args.layout,
        "rows": len(dataset) * args.clips,
        "rows_per_shard": args.rows_per_shard,
        "samples": len(dataset),
        "clips": args.clips,
        "flip": flip,
        "seed": getattr(dataset, "seed", 0),
        "dtype": args.dtype,
        "precision": args.precision,
        "vae": made_by(vae),
        "text": None if text is None else made_by(text),
        "dataset": {key: value for key, value in made_of.items() if key not in NOT_KEPT},
        "list": list_hash(dataset),
        "classes": None if classes is None else list(classes),
    }
    if parts:  # older caches are told from others by having none
        manifest["seen"] = {part.field: made_by(part) for part in parts}
    return manifest


def made_by(encoder: Any) -> dict[str, Any]:
    """What made a cache, in plain values."""
    return {**encoder.identity(), "weights": encoder.fingerprint()}


class Encoder:
    """Samples to what is stored of them.

    Args:
        cfg: The config.
        args: The command line.
        vae: The VAE, where it is to run.
        conditioner: Of what is told of the samples, there, or None.
        flip: How often the pipeline flips.
        seed: Of the dataset.
    """

    def __init__(
        self,
        cfg: "Config",
        args: argparse.Namespace,
        vae: Any,
        conditioner: Any,
        flip: float,
        seed: int,
    ) -> None:
        import torch

        from mmsora.models.conditioners.looking import lookers
        from mmsora.registry import MODELS

        config = cfg.model.get("data_preprocessor") or {"type": "mmsora.VideoPreprocessor"}
        self.device = next(iter(vae.state_dict().values()), torch.empty(0)).device
        self.preprocess = MODELS.build(config).to(self.device)
        self.vae, self.flip, self.seed = vae, flip, seed
        self.text, self.lookers = text_encoder_of(conditioner), lookers(conditioner)
        self.npy, self.dtype = args.layout == "npy", getattr(torch, args.dtype)
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=args.precision == "bf16"
        )

    def __call__(self, batch: Sequence[dict[str, Any]]) -> list[dict[str, "Tensor"]]:
        """The records of some samples."""
        records = []
        for _, group in itertools.groupby(batch, lambda item: item["inputs"].shape):
            records += self.encode(list(group))
        return records

    def encode(self, batch: Sequence[dict[str, Any]]) -> list[dict[str, "Tensor"]]:
        """The records of samples of one size.

        Args:
            batch: What the dataset gave.

        Returns:
            For each its ``moments``, (flips, 1 or 2, c, t, h, w), or with the layout ``npy`` a
            latent (c, t, h, w), its annotation, and what conditioners are told: embeddings of
            texts, and what is seen in the sides of the clip, (flips, ...).

        Raises:
            UserError: A latent is not finite.
        """
        import torch

        from mmsora.utils.draws import Draws

        names = ("inputs", "data_samples")
        data = self.preprocess({name: [item[name] for item in batch] for name in names})
        videos, samples = data["inputs"], data["data_samples"]
        with torch.inference_mode(), self.autocast:
            if self.npy:
                draws = Draws(self.seed, [sample.index for sample in samples])
                flipped = (draws.uniform("clip flip") < self.flip).to(videos.device)
                mirrored = flipped.view(-1, 1, 1, 1, 1)
                found = self.vae.encode(torch.where(mirrored, videos.flip(-1), videos), draws)
            else:
                sides = [videos, videos.flip(-1)] if self.flip else [videos]
                found = torch.stack([self._moments(side) for side in sides], dim=1)
        rows = self._stored(found, samples)
        if not self.npy:
            seen = self._seen(sides, samples)
            rows = [row | more for row, more in zip(rows, seen, strict=True)]
        texts = self._texts(samples)
        return [
            {**row, **annotation(sample), **text}
            for row, sample, text in zip(rows, samples, texts, strict=True)
        ]

    def _stored(
        self, found: "Sequence[Tensor]", samples: Sequence[Any], name: str = "moments"
    ) -> list[dict[str, "Tensor"]]:
        rows = [row.to(self.dtype).cpu() for row in found]
        for row, sample in zip(rows, samples, strict=True):
            if not row.isfinite().all():
                raise UserError(
                    f"{sample.get('path', f'sample {sample.index}')}: its latent is not finite in "
                    f"{self.dtype}; use --dtype float32 and --precision off"
                )
        return [{name: row} for row in rows]

    def _seen(
        self, sides: "Sequence[Tensor]", samples: Sequence[Any]
    ) -> list[dict[str, "Tensor"]]:
        """What conditioners see in both sides of samples."""
        import torch

        from mmsora.datasets.cached import SEEN
        from mmsora.utils.draws import Draws

        records: list[dict[str, Tensor]] = [{} for _ in samples]
        draws = Draws(self.seed, [sample.index for sample in samples])
        for part in self.lookers:
            with torch.inference_mode(), self.autocast:
                of_sides = [part.see_all(side, samples, draws) for side in sides]
            for field in of_sides[0]:
                both = zip(*(side[field] for side in of_sides), strict=True)
                found = self._stored([torch.stack(one) for one in both], samples, SEEN + field)
                records = [record | row for record, row in zip(records, found, strict=True)]
        return records

    def _texts(self, samples: Sequence[Any]) -> list[dict[str, "Tensor"]]:
        """The embeddings of the texts of samples, and of those of the images beside them."""
        import torch

        if self.text is None:
            return [{} for _ in samples]
        told = []
        for sample in samples:
            texts = [sample.get("text"), *(sample.get("image_texts") or ())]
            if None in texts or len(texts) != 1 + (sample.get("num_images") or 0):
                where = sample.get("path", f"sample {sample.index}")
                raise UserError(f"{where}: it, or an image beside it, has no text to embed")
            told.append(texts)
        with torch.inference_mode():
            states, masks = self.text([text for texts in told for text in texts])
        states, masks = states.to(self.dtype).cpu(), masks.cpu()
        if not states.isfinite().all():
            raise UserError(f"an embedding is not finite in {self.dtype}; use --dtype float32")
        found, sizes = [], [len(texts) for texts in told]
        for state, mask in zip(states.split(sizes), masks.split(sizes), strict=True):
            record = {"sample.text_embedding": state[0], "sample.text_mask": mask[0]}
            if len(state) > 1:
                record["sample.image_text_embeddings"] = state[1:]
            found.append(record)
        return found

    def _moments(self, videos: "Tensor") -> "Tensor":
        import torch

        mean, std = self.vae.moments(videos)
        return torch.stack([mean] if std is None else [mean, std], dim=1)


def annotation(sample: Any) -> dict[str, "Tensor"]:
    """What is known of a sample, as tensors: one of JSON, and its own.

    Args:
        sample: The sample.

    Returns:
        The tensors by name.

    Raises:
        UserError: There is something that cannot be stored.
    """
    import torch

    tensors, plain = {}, {}
    for key, value in sample.items():
        if isinstance(value, torch.Tensor):
            tensors[f"sample.{key}"] = value
        elif key != "index":
            plain[key] = value
    try:
        text = json.dumps(plain, ensure_ascii=False, sort_keys=True)
    except TypeError as error:
        raise UserError(f"annotations are plain values or tensors: {error}") from error
    return {**tensors, "annotation": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def batches(
    dataset: Any, writer: "FeatureWriter", args: argparse.Namespace, workers: int
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The samples of all shards that this process is still to write, read ahead.

    Args:
        dataset: The dataset.
        writer: Of the shards.
        args: The command line.
        workers: Processes that read.

    Yields:
        The number of a shard, and some of its samples.
    """
    from torch.utils.data import DataLoader

    plan = []
    for shard in writer.missing():
        rows = writer.rows_of(shard)
        numbers = [row // args.clips + row % args.clips * len(dataset) for row in rows]
        for begin in range(0, len(numbers), args.batch_size):
            plan.append((shard, numbers[begin : begin + args.batch_size]))
    loader = DataLoader(
        dataset,
        batch_sampler=[numbers for _, numbers in plan],
        num_workers=workers,
        collate_fn=list,
    )
    yield from zip((shard for shard, _ in plan), loader, strict=True)


def extract(
    dataset: Any,
    writer: "FeatureWriter",
    encoder: Encoder,
    args: argparse.Namespace,
    workers: int,
) -> None:
    """Write the shards of this process.

    Args:
        dataset: The dataset.
        writer: Of the shards.
        encoder: Of the samples.
        args: The command line.
        workers: Processes that read.
    """
    total = sum(len(writer.rows_of(shard)) for shard in writer.missing())
    start, done, what = time.perf_counter(), 0, "clips"
    written: Future | None = None
    with ThreadPoolExecutor(1) as thread:  # writes while the next shard is encoded
        groups = itertools.groupby(batches(dataset, writer, args, workers), lambda item: item[0])
        for shard, group in groups:
            records: list[dict[str, Tensor]] = []
            for _, batch in group:
                what = "images" if batch[0]["inputs"].shape[1] == 1 else "clips"
                records += encoder(batch)
            if written is not None:
                written.result()
            written = thread.submit(writer.write, shard, records)
            done += len(records)
            speed = done / (time.perf_counter() - start)
            print(f"{done} of {total} {what}, {speed:.1f} {what}/s", flush=True)
        if written is not None:
            written.result()


def run(args: argparse.Namespace) -> None:
    """Extract.

    Args:
        args: The command line.
    """
    import torch

    from mmsora.registry import DATASETS, VAES
    from mmsora.utils.config_check import user_errors
    from mmsora.utils.feature_store import FeatureWriter
    from mmsora.utils.npy_store import NpyWriter

    rank, world = share_of(args.share)
    cfg = prepare(args)
    torch.backends.cudnn.deterministic = True  # the same bytes every time
    gpu = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if torch.cuda.is_available() else "cpu"
    with user_errors():
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
        flip, conditioner = take_flip(dataset), conditioner_of(cfg, args)
        check_texts(dataset, conditioner)
        vae, device = VAES.build(cfg.model.vae).requires_grad_(False).eval(), args.device or gpu
        vae.init_weights()
        if conditioner is not None:
            conditioner.init_weights()
            conditioner.eval()
        manifest = manifest_of(cfg, args, dataset, vae, conditioner, flip)
        vae, conditioner = vae.to(device), conditioner and conditioner.to(device)
        encoder = Encoder(cfg, args, vae, conditioner, flip, manifest["seed"])
        if args.layout == "npy":
            writer: FeatureWriter = NpyWriter(args.out, manifest, rank, world, args.name)
        else:
            writer = FeatureWriter(args.out, manifest, rank, world)
        if encoder.text is not None:
            write_texts(writer, encoder.text, prompts_of(cfg))
    workers = args.workers
    if workers is None:
        workers = cfg.train_dataloader.get("num_workers", 0)
    with user_errors():
        extract(dataset, writer, encoder, args, workers)
    missing = writer.finish()
    if missing:
        print(f"{missing} of {writer.num_shards} shards are still to come from other processes")
    else:
        size = sum(path.stat().st_size for path in Path(args.out).rglob("*.*")) / 2**20
        print(f"{args.out}: {manifest['rows']} samples, {size:.1f} MiB")


def main(argv: list[str] | None = None) -> None:
    """Extract, or verify."""
    args = parse_args(argv)
    with user_errors_as_one_line():
        if args.verify:
            from mmsora.utils.feature_store import FeatureStore

            store = FeatureStore(args.out)
            store.verify()
            print(f"{args.out}: {len(store)} samples, all as they were written")
            return
        run(args)


if __name__ == "__main__":
    main()
