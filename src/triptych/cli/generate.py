"""`triptych generate`: from a prompt to a file."""

from __future__ import annotations

import time
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from triptych.cli.acceleration import Given, accelerated, accelerations, flags
from triptych.cli.arguments import Asked, model_and_prompt, parse_loras, parse_parameters, parse_size
from triptych.cli.console import logging_to, quieten_libraries, stderr_console
from triptych.cli.errors import reported
from triptych.cli.leaving import at_once
from triptych.cli.media import open_images
from triptych.cli.options import Debug, Dtype, Revision, Tasks, Variant, dtype_spec, path_of
from triptych.cli.output import check_output, kind_of, output_path, progress, summary
from triptych.cli.remote import check_remote, generate_remotely
from triptych.runtime.collection import collection_paused

_REQUEST, _OUTPUT = "Request", "Output"  # headings of --help


@accelerated
def generate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="The prompt, after the model: a folder in diffusers' layout or a hub id. "
            "Without a model, the emoji model that ships.",
            show_default=False,
        ),
    ],
    seed: Annotated[
        int | None,
        typer.Option(
            help="Where the random numbers start; drawn, and printed, where left out.", rich_help_panel=_REQUEST
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(help="Pixels.", rich_help_panel=_REQUEST),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Pixels.", rich_help_panel=_REQUEST),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Width and height in one: 1024x768.", rich_help_panel=_REQUEST),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Denoising steps.", rich_help_panel=_REQUEST),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="The guidance scale.", rich_help_panel=_REQUEST),
    ] = None,
    true_cfg: Annotated[
        float | None,
        typer.Option(help="The scale of guidance by the negative prompt (Qwen-Image).", rich_help_panel=_REQUEST),
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(help="What it should not look like.", rich_help_panel=_REQUEST),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            parser=path_of,
            metavar="FILE",
            help="A picture to start from or to refer to; may be repeated.",
            rich_help_panel=_REQUEST,
        ),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(help="Outputs, images or videos, made as one batch.", rich_help_panel=_REQUEST),
    ] = None,
    num_frames: Annotated[
        int | None,
        typer.Option(help="Frames of a video.", rich_help_panel=_REQUEST),
    ] = None,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens of the prompt that count.", rich_help_panel=_REQUEST),
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="Every forward as diffusers runs it (the default), or guidance branches joined in one.",
            rich_help_panel=_REQUEST,
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:SCALE]",
            help="A LoRA: a safetensors file, a folder with one, or a hub id, and its weight (1.0); may be repeated.",
            rich_help_panel=_REQUEST,
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Any other parameter of the family, its value in JSON or plain text, or @FILE for the picture or video "
            "in a file: last_image=@end.png; may be repeated. "
            "`triptych families NAME` lists them.",
            rich_help_panel=_REQUEST,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=path_of,
            metavar="PATH",
            help="Where to write: .png, .jpg, .webp; .mp4, .gif for videos. Replaces what is there. Left out, or a folder: "
            "<prompt>-<seed>.png (.mp4) under a name that is free. Several outputs are numbered.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The model, for who likes to name it.", rich_help_panel="Model"),
    ] = None,
    dtype: Dtype = None,
    tasks: Tasks = None,
    revision: Revision = None,
    variant: Variant = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="A torch device, or auto, the default: the first accelerator there is.", rich_help_panel="Model"
        ),
    ] = None,
    split: Annotated[
        bool,
        typer.Option(
            "--split",
            help="Run encoder, denoiser and decoder in processes of their own, one after another: the same file, with "
            "less memory at a time.",
            rich_help_panel="Model",
        ),
    ] = False,
    acceleration: Given = MappingProxyType({}),
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Let a running `triptych serve` make it. What is not given is the service's default; ask it for --exact "
            "where the picture has to be the same to the bit.",
            rich_help_panel="Model",
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell what each role loaded; let the libraries speak.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only the paths written, and warnings and errors.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Make a picture or a video from a prompt and write it to a file, whose path is printed on stdout.

    Example:  [bold]triptych generate black-forest-labs/FLUX.2-klein-4B "a red fox in the snow" -o fox.png --seed 7[/]

    What is not given is the model's default. Exit codes: 2 usage, 3 model, 4 internal, 1 unexpected.
    """
    console = stderr_console()
    console.quiet = quiet
    with reported(debug), logging_to(stderr_console(), verbose=verbose):
        if server is not None:
            local = {"--model": model, "--dtype": dtype, "--tasks": tasks, "--revision": revision, "--variant": variant}
            check_remote(arguments, {**local, "--device": device, "--split": split or None, **flags(acceleration)})
        faster = accelerations(acceleration)
        source, prompt = model_and_prompt(arguments, model)
        asked = Asked()
        asked.add("prompt", prompt)
        asked.add("negative_prompt", negative_prompt)
        asked.add("seed", seed)
        for name, pixels in zip(("width", "height"), parse_size(size)):
            asked.add(name, pixels, "--size")
        asked.add("height", height)
        asked.add("width", width)
        asked.add("num_inference_steps", steps)
        asked.add("guidance_scale", guidance)
        asked.add("true_cfg_scale", true_cfg)
        asked.add("num_images_per_prompt", num_images)
        asked.add("num_frames", num_frames)
        asked.add("max_sequence_length", max_sequence_length)
        asked.add("exact", exact)
        asked.add("lora", parse_loras(lora or []))
        for name, value in parse_parameters(param or []):
            asked.add(name, value, f"--param {name}")
        asked.add("image", open_images(image or []))
        if any(each.inexact for each in faster.values()):
            asked.values.setdefault("exact", False)  # the default is the exact one only where there is one

        if server is not None:
            for each in generate_remotely(server, asked, output, console):
                print(each)
            return

        began = time.perf_counter()
        import triptych  # heavy from here on: everything above is checked first

        device = device or "auto"
        options: dict[str, Any] = {"dtype": dtype_spec(dtype), "revision": revision, "variant": variant}
        options["acceleration"] = faster
        with at_once():
            if not verbose:
                quieten_libraries(downloads=not quiet)
            console.print(f"Opening {source}", markup=False, soft_wrap=True)
            with collection_paused():
                checker = triptych.load(
                    source, role="server", device="cpu" if split else device, tasks=tasks or None, **options
                )
            state = asked.admit(checker)
            kind = kind_of(checker.family, state)
            check_output(output, kind, checker.family.frame_rate(state.fields))
        options["revision"] = checker.family.repository.files.revision or revision  # no two roles of two revisions
        loading = {"libraries, checks": time.perf_counter() - began}

        if split:
            from triptych.runtime.split import run_split

            with progress(console) as on_step:
                state = run_split(
                    source,
                    state,
                    device=device,
                    **options,
                    on_step=on_step,
                    on_loaded=lambda role, seconds: loading.update({f"loading {role}": seconds}),
                    show_output=verbose,
                )
        else:
            began = time.perf_counter()
            with at_once():  # it imports the components' own modules
                loaded = triptych.load(source, device=device, tasks=[state.task], **options)
            loading["loading"] = time.perf_counter() - began
            with progress(console) as on_step:
                state = loaded.run(state, on_step=on_step)
        began = time.perf_counter()
        result = state.result
        path = output_path(output, kind, prompt=prompt, seed=result.seed, count=result.count)
        written = result.save(path)
        summary(console, {**loading, **result.timings, "writing": time.perf_counter() - began}, result.seed)
        for each in written:
            print(each)
