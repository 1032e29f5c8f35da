"""Look at a dataset before training on it.

python tools/dataset.py probe data/own
python tools/dataset.py browse configs/own_data/latte_s2_own_clips.py
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsora.utils.cli_options import key_values
from mmsora.utils.user_error import UserError, user_errors_as_one_line

if TYPE_CHECKING:
    import numpy as np
    from mmengine.config import Config

    from mmsora.datasets.buckets import Buckets
    from mmsora.datasets.survey import Looked

SIZES = ((1, 256), (17, 256), (33, 256), (65, 256), (1, 512), (17, 512), (33, 512), (65, 512))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Look at a dataset before training on it.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    probe = commands.add_parser(
        "probe",
        help="what the files hold, which cannot be read: a page and JSON",
        description="Looks at every file and changes none. Writes report.html and report.json, "
        "and files.jsonl: a list of what can be read, with sizes, that AnnotatedVideos trains on.",
    )
    probe.add_argument("target", help="a folder; or a config, for the data that it trains on")
    probe.add_argument(
        "--ann-file", help="list in the folder, if it has another name than metadata.csv and such"
    )
    probe.add_argument("--out", default="dataset_report", help="folder to write to")
    probe.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="files looked at together"
    )
    probe.add_argument(
        "--decode", action="store_true", help="decode every frame, which alone finds all damage"
    )
    probe.add_argument(
        "--sizes",
        nargs="+",
        type=frames_and_side,
        metavar="TxSIDE",
        help="buckets to count into, as 17x256; default the config's, else some usual ones",
    )
    browse = commands.add_parser(
        "browse",
        help="contact sheets of what the model would see",
        description="Runs a config's transforms and writes a contact sheet for each size of "
        "clips. Frames are shown evenly over the clip; more pixels than --side are shown smaller.",
    )
    browse.add_argument("target", metavar="config", help="path or name of a config")
    browse.add_argument("--out", default="dataset_sheets", help="folder to write to")
    browse.add_argument("--num-samples", "-n", type=int, default=16)
    browse.add_argument("--start", type=int, help="the first sample; default: evenly over all")
    browse.add_argument("--epoch", type=int, default=0, help="whose random choices")
    browse.add_argument("--frames", type=int, default=8, help="shown of a clip, at most")
    browse.add_argument("--side", type=int, default=160, help="of a frame as shown, at most")
    for command in (probe, browse):
        command.add_argument(
            "--cfg-options", nargs="+", type=key_values, default=[], metavar="KEY=VALUE"
        )
    args = parser.parse_args(argv)
    least = {"num_samples": 1, "epoch": 0, "frames": 1, "side": 8, "workers": 1, "start": 0}
    for name, minimum in least.items():
        value = getattr(args, name, None)
        if value is not None and value < minimum:
            commands.choices[args.command].error(
                f"--{name.replace('_', '-')} must be at least {minimum}, got {value}"
            )
    if Path(args.out).is_file():
        parser.error(f"--out {args.out} is a file, not a directory")
    return args


def frames_and_side(text: str) -> tuple[int, int]:
    """Frames and side from ``TxSIDE``."""
    frames, _, side = text.partition("x")
    if not (frames.isdigit() and side.isdigit()):
        raise argparse.ArgumentTypeError(f"expected TxSIDE, as 17x256, got {text!r}")
    return int(frames), int(side)


def prepare(args: argparse.Namespace) -> "Config":
    """The config, with the command line applied.

    Args:
        args: The command line.

    Returns:
        The config.

    Raises:
        UserError: It trains on nothing.
    """
    from mmengine.registry import init_default_scope

    from mmsora.utils.config_check import apply_overrides, check_config
    from mmsora.utils.config_names import load_config

    cfg = load_config(args.target)
    apply_overrides(cfg, dict(args.cfg_options))
    check_config(cfg)
    init_default_scope("mmsora")
    if not cfg.get("train_dataloader"):
        raise UserError(f"{args.target} has no train_dataloader to look at")
    return cfg


def built(cfg: "Config") -> Any:
    """The dataset of a config."""
    from mmsora.registry import DATASETS
    from mmsora.utils.config_check import user_errors

    with user_errors():
        return DATASETS.build(cfg.train_dataloader.dataset)


def buckets_of(args: argparse.Namespace, cfg: "Config | None") -> "Buckets":
    """The sizes to count clips into.

    Args:
        args: The command line.
        cfg: The config, if one is looked at.

    Returns:
        Those asked for, else the config's, else some usual ones.
    """
    from mmsora.datasets.buckets import Buckets
    from mmsora.registry import TASK_UTILS
    from mmsora.utils.config_check import user_errors

    theirs = (cfg.train_dataloader.get("batch_sampler") or {}).get("buckets") if cfg else None
    with user_errors():
        if args.sizes or theirs is None:
            return Buckets(args.sizes or SIZES, short="skip")
        return TASK_UTILS.build({**theirs, "short": "skip"})


def write_list(path: Path, found: "Sequence[Looked]") -> int:
    """Write a list of what can be read, which ``AnnotatedVideos`` takes.

    Args:
        path: The file to write.
        found: All that was looked at.

    Returns:
        How many entries it has; without any it is not written.
    """
    from mmsora.datasets.survey import SHAPE
    from mmsora.utils.atomic import write_text

    lines = []
    for entry, facts, _ in found:
        if facts is None or facts.kind == "frames" or "shard" in entry:
            continue  # it takes neither folders of frames nor what lies in tar files
        kept: dict[str, Any] = {
            key: entry[key] for key in ("path", "text", "label", "cut", "crop") if key in entry
        }
        shape = (facts.info.frames, facts.info.height, facts.info.width)
        kept |= {**dict(zip(SHAPE, shape, strict=True)), "fps": round(facts.info.fps, 4)}
        lines.append(json.dumps(kept, ensure_ascii=False) + "\n")
    if lines:
        write_text(path, "".join(lines))
    return len(lines)


def sections(report: dict[str, Any]) -> list[tuple[str, Any]]:
    """A report as headings and contents, for the page.

    Args:
        report: From ``summary``.

    Returns:
        The sections.
    """
    counted = {
        "files": f"{report['files']:,}",
        "videos": f"{report['videos']:,}",
        "images": f"{report['images']:,}",
        "folders of frames": f"{report['frame_folders']:,}",
        "unreadable": f"{len(report['unreadable']):,}",
        "bytes": f"{report['bytes']:,}",
        "hours of video": f"{report['hours']:.3f}",
    }
    page: list[tuple[str, Any]] = [
        ("Files", counted),
        ("Cannot be read", [f"{one['path']}: {one['cause']}" for one in report["unreadable"]]),
        (
            "The list says another size than the file has",
            [f"{o['path']}: {o['list']}, the file {o['file']}" for o in report["wrong_in_list"]],
        ),
        (
            "Clips in each bucket that has any",
            {name: count for name, count in report.get("buckets", {}).items() if count},
        ),
        ("Codecs", report["codecs"]),
        ("Sizes, height x width", report["sizes"]),
        ("Frames per second", report["fps"]),
        *spread("Frames", report["frames"]),
        *spread("Seconds", report["seconds"]),
    ]
    captions, classes = report["captions"], report["classes"]
    if captions:
        names = ("entries_with", "entries_without", "captions", "different")
        table = {name.replace("_", " "): f"{captions[name]:,}" for name in names}
        page += [("Captions", table), *spread("Words of a caption", captions["words"])]
        page.append(("The most frequent captions", captions["most_frequent"]))
    if classes:
        page.append(("Classes", {"classes": f"{classes['number']:,}"}))
        page += spread("Samples of a class", classes["samples"])
    return page


def spread(heading: str, values: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """A histogram and its key figures as sections."""
    if not values:
        return []
    names = ("least", "mean", "median", "most")
    figures = ", ".join(f"{name} {values[name]:,.4g}" for name in names)
    return [(f"{heading}: {figures}", values["histogram"])]


def probe(args: argparse.Namespace) -> None:
    """Look at every file.

    Args:
        args: The command line.

    Raises:
        UserError: There is nothing to look at.
    """
    from mmsora.datasets.survey import entries_of, entries_of_folder, summary, survey
    from mmsora.utils.atomic import write_json, write_text
    from mmsora.utils.config_check import user_errors
    from mmsora.visualization.report_page import report_page

    cfg = None if Path(args.target).is_dir() else prepare(args)
    if cfg is not None and args.ann_file:
        raise UserError(
            "--ann-file is for folders; a config has train_dataloader.dataset.ann_file"
        )
    if cfg is None and args.cfg_options:
        raise UserError(f"--cfg-options is for configs; {args.target} is a folder")
    dataset = built(cfg) if cfg is not None else entries_of_folder(args.target, args.ann_file)
    buckets, out = buckets_of(args, cfg), Path(args.out)
    with user_errors():
        entries = entries_of(dataset)
        print(f"{len(entries):,} files to look at", flush=True)
        found = list(survey(entries, args.workers, args.decode))
        report = {"target": args.target, **summary(found, buckets)}
    write_json(out / "report.json", report)
    write_text(out / "report.html", report_page(f"Dataset {args.target}", sections(report)))
    listed = write_list(out / "files.jsonl", found) if hasattr(dataset, "data_root") else 0
    for one in report["unreadable"][:20]:
        print(f"unreadable: {one['path']}: {one['cause']}")
    if report["wrong_in_list"]:
        print(f"the list has another size than the file for {len(report['wrong_in_list']):,}")
    good = report["files"] - len(report["unreadable"])
    print(f"{good:,} of {report['files']:,} files can be read; wrote {out / 'report.html'}")
    if listed:
        place = out / "files.jsonl"
        print(f"wrote {place}: {listed:,} entries, paths from {dataset.data_root}")


def samples(cfg: "Config", dataset: Any, args: argparse.Namespace) -> list[int]:
    """The numbers of the samples to show, in the sizes that their buckets have.

    Args:
        cfg: The config.
        dataset: Its dataset.
        args: The command line.

    Returns:
        Numbers, epochs included.

    Raises:
        UserError: The dataset has no such sample.
    """
    import numpy as np

    from mmsora.datasets.buckets import BucketIndex, shapes_of
    from mmsora.utils.config_check import user_errors

    size = len(dataset)
    if args.start is not None and args.start >= size:
        raise UserError(f"--start {args.start}: the last of {size} samples is {size - 1}")
    if args.epoch and not getattr(dataset, "takes_epochs", False):
        raise UserError(f"--epoch {args.epoch}: {type(dataset).__name__} is the same every epoch")
    if args.start is not None:
        numbers = np.arange(args.start, min(args.start + args.num_samples, size))
    else:
        numbers = np.unique(np.linspace(0, size - 1, min(args.num_samples, size)).astype(int))
    first = args.epoch * size
    if not (cfg.train_dataloader.get("batch_sampler") or {}).get("buckets"):
        return [first + int(number) for number in numbers]
    args.sizes = None
    with user_errors():
        buckets = buckets_of(args, cfg)
        places = buckets.assign(shapes_of(dataset)[numbers])
    return [
        BucketIndex(first + int(number), buckets.shapes[place])
        for number, place in zip(numbers, places, strict=True)
        if place >= 0
    ]


def title(number: int, sample: Any, classes: Sequence[str]) -> str:
    """What is written at a clip: its number, class, caption and file."""
    label = sample.get("label")
    known = [] if label is None else [classes[label] if label < len(classes) else str(label)]
    known += [str(sample.get(key)) for key in ("text",) if sample.get(key)]
    if sample.get("path"):
        known.append(Path(sample.path).name)
    stands_in = (
        " (cannot be used; the next one in its place)" if not sample.get("weight", 1) else ""
    )
    return f"{number}{stands_in} {' | '.join(known)}"


def shown(clip: Any, args: argparse.Namespace) -> "np.ndarray":
    """Some frames of a clip, no larger than asked for.

    Args:
        clip: uint8 (C, T, H, W).
        args: The command line.

    Returns:
        uint8 (C, T, H, W).
    """
    import cv2
    import numpy as np

    frames = np.moveaxis(clip.numpy(), 0, -1)
    count, height, width, channels = frames.shape
    frames = frames[np.linspace(0, count - 1, min(count, args.frames)).astype(int)]
    share = args.side / max(height, width)
    if share < 1:
        size = max(round(width * share), 1), max(round(height * share), 1)
        smaller = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames]
        frames = np.stack(smaller).reshape(len(frames), size[1], size[0], channels)
    return np.moveaxis(frames, -1, 0)


def browse(args: argparse.Namespace) -> None:
    """Show what the model would see.

    Args:
        args: The command line.

    Raises:
        UserError: The samples are no pixels.
    """
    import numpy as np
    import torch

    from mmsora.utils.config_check import user_errors
    from mmsora.utils.video_io import viewing_scale, write_image
    from mmsora.visualization.contact_sheet import contact_sheet

    cfg = prepare(args)
    dataset = built(cfg)
    classes = getattr(dataset, "metainfo", {}).get("classes", ())
    sheets: dict[tuple[int, ...], list[tuple[str, np.ndarray]]] = {}
    numbers = samples(cfg, dataset, args)
    for count, number in enumerate(numbers, start=1):
        with user_errors():
            data = dataset[number]
        clip = data["inputs"]
        if clip.dtype != torch.uint8 or clip.ndim != 4:
            raise UserError(
                f"{type(dataset).__name__} gives {clip.dtype} {tuple(clip.shape)}, not pixels; "
                "browse the config that the cache was made with"
            )
        text = title(int(number), data["data_samples"], classes)
        sheets.setdefault(tuple(clip.shape[1:]), []).append((text, shown(clip, args)))
        print(
            f"{count} of {len(numbers)}: {' x '.join(map(str, clip.shape[1:]))} {text}", flush=True
        )
    for shape, clips in sorted(sheets.items()):
        pixels = np.stack([clip for _, clip in clips])
        scale = min(viewing_scale(*pixels.shape[-2:]), max(args.side // max(pixels.shape[-2:]), 1))
        path = Path(args.out) / f"{'x'.join(map(str, shape))}.png"
        write_image(path, contact_sheet(pixels, [text for text, _ in clips], scale=scale))
        print(f"wrote {path}: {len(clips)} clips of {' x '.join(map(str, shape))}")


def main(argv: list[str] | None = None) -> None:
    """Look."""
    args = parse_args(argv)
    with user_errors_as_one_line():
        {"probe": probe, "browse": browse}[args.command](args)


if __name__ == "__main__":
    main()
