"""Judges videos of the toy world in pixels, against the words of their prompts.

    python -m examples.train_demo.evaluate --seeds 2 --chunks 20 --batch 12

Either a model: it renders the prompts that were held out of training, chunk by chunk; or one finished video and its
prompt. The figures say how often background, colour, shape and direction of a chunk are right, how fast the shape
moves, and whether that changes from the first chunk to the last.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v3
import torch
from tqdm import tqdm

from examples.train_demo import world
from examples.train_demo.images import save_contact_sheet
from examples.train_demo.latent_pool import CHUNK_FRAMES, pixel_frames
from examples.train_demo.score import VideoScore, score_video, summarize
from examples.train_demo.train_vae import held_out_psnr
from wan_autoregressive import WanAutoregressivePipeline, demo_checkpoint

SHEET_ROWS = 12


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate with the arguments of the command line and print the figures as JSON; exits with 2 for wrong ones."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        figures, scores = _evaluate(args)
    except ValueError as error:
        parser.error(str(error))
    report = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    print(json.dumps(report, indent=2))
    if args.output is not None:
        videos = [_as_json(score) for score in scores]
        args.output.write_text(json.dumps({**report, "per_video": videos}, indent=1) + "\n", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder (default: the packaged demo)")
    source.add_argument("--video", type=Path, metavar="FILE", help="judge this 64 x 64 video instead of a model")
    parser.add_argument("--prompt", help="prompt of --video; with a model, evaluate this prompt only")
    parser.add_argument("--prompts", choices=("held-out", "all"), default="held-out", help="default: held-out")
    parser.add_argument("--limit", type=int, help="render only so many prompts, spread evenly")
    parser.add_argument("--seeds", type=int, default=2, help="videos per prompt (default: 2)")
    parser.add_argument("--chunks", type=int, default=20, help="length in chunks of 3 latent frames (default: 20)")
    parser.add_argument("--window-frames", type=int, default=12, help="latent frames attended to (default: 12)")
    parser.add_argument("--sink-frames", type=int, default=0, help="first latent frames that stay (default: 0)")
    parser.add_argument("--batch", type=int, default=8, help="videos rendered together (default: 8)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the figures, per video too, as JSON")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help=f"contact sheet of the first {SHEET_ROWS} videos")
    return parser


def evaluate_pipeline(
    pipe: WanAutoregressivePipeline,
    scenes: list[world.Scene],
    seeds: int = 1,
    chunks: int = 4,
    window_frames: int | None = 12,
    sink_frames: int = 0,
    batch: int = 8,
    sheet: Path | None = None,
    **options: Any,
) -> list[VideoScore]:
    """Render `scenes` x `seeds` videos of `chunks` chunks and score each. Scene i, seed s always gives one video.
    `options` are further arguments of the pipeline."""
    jobs = [(scene, 1000 * seed + index) for seed in range(seeds) for index, scene in enumerate(scenes)]
    scores: list[VideoScore] = []
    shown: list[torch.Tensor] = []
    for start in tqdm(range(0, len(jobs), batch), "evaluate", unit="batch"):
        part = jobs[start : start + batch]
        frames = pipe(
            [scene.prompt for scene, _ in part],
            num_frames=pixel_frames(chunks * CHUNK_FRAMES),
            height=world.SIZE,
            width=world.SIZE,
            chunk_frames=CHUNK_FRAMES,
            window_frames=window_frames,
            sink_frames=sink_frames,
            generator=[torch.Generator().manual_seed(seed) for _, seed in part],
            **options,
        ).frames
        scores += [score_video(video, scene) for video, (scene, _) in zip(frames, part, strict=True)]
        shown += [torch.from_numpy(video).permute(3, 0, 1, 2) for video in frames[: SHEET_ROWS - len(shown)]]
    if sheet is not None:
        save_contact_sheet(torch.stack(shown) * 2 - 1, sheet)
    return scores


def _evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], list[VideoScore]]:
    for name in ("limit", "seeds", "chunks", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    if args.video is None:
        return _evaluate_model(args)
    if args.prompt is None:
        raise ValueError("--video needs --prompt, to know what it should show")
    scores = [score_video(_read_video(args.video), world.parse_prompt(args.prompt))]
    return summarize(scores), scores


def _evaluate_model(args: argparse.Namespace) -> tuple[dict[str, Any], list[VideoScore]]:
    folder = demo_checkpoint() if args.model is None else args.model
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"there is no checkpoint in '{folder}': model_index.json is missing")
    pipe = WanAutoregressivePipeline.from_pretrained(str(folder), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if args.prompt is not None:
        scenes = [world.parse_prompt(args.prompt)]
    else:
        scenes = world.held_out_scenes() if args.prompts == "held-out" else world.all_scenes()
    scenes = world.spread(scenes, args.limit or len(scenes))
    scores = evaluate_pipeline(
        pipe,
        scenes,
        seeds=args.seeds,
        chunks=args.chunks,
        window_frames=args.window_frames,
        sink_frames=args.sink_frames,
        batch=args.batch,
        sheet=args.sheet,
    )
    return {**summarize(scores), "chunks": args.chunks, "vae_psnr_db": held_out_psnr(pipe.vae)}, scores


def _read_video(path: Path) -> torch.Tensor:
    try:
        frames = imageio.v3.imread(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the video '{path}': {error}") from error
    return torch.from_numpy(frames[..., :3].copy())


def _as_json(score: VideoScore) -> dict[str, Any]:
    chunks = [vars(chunk) for chunk in score.chunks]
    return {"prompt": score.prompt, "flicker": score.flicker, "chunks": chunks}


if __name__ == "__main__":
    main()
