"""`bard-vl check`: what a file of chats holds for training."""

import importlib.util
import json
from functools import partial
from typing import Annotated, Any

import typer

from .ending import Misuse, interrupted_at_once
from .options import open_session, opens_session, print_notices


@partial(opens_session, names=("model", "revision", "block_size", "max_pixels", "min_pixels"))
def check(
    data: Annotated[
        str,
        typer.Argument(
            metavar="CHATS", help="A JSONL or parquet file, a folder of them, or a data set by path or name."
        ),
    ],
    *,
    options: dict[str, Any],
    max_length: Annotated[int, typer.Option(min=1, help="Columns of a packed row.")] = 8192,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    media_folder: Annotated[
        str | None, typer.Option(help="Where relative paths start. Default: the data's folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Read chats as training would, without training: how many can be used, why others cannot, how long they are.

    The first skipped chats of each reason are named on standard error.
    Needs the training extra: pip install "bard-vl\\[train]".
    """
    if importlib.util.find_spec("datasets") is None:
        raise Misuse('reading chats needs datasets: pip install "bard-vl[train]"')
    session = open_session({**options, "device": "cpu"})
    print_notices(session)
    with interrupted_at_once():
        import datasets
        from bard_vl.app.terminal import counted
        from bard_vl.training.chats import ChatEncoder, ChatLimits
        from bard_vl.training.data import ChatSamples, media_folder_of, open_chats
    datasets.disable_progress_bars()
    size = session.settings.block_size or session.config.block_size
    assert size is not None, "a session has one"
    limits = ChatLimits(size, max_length)
    encoder = ChatEncoder(session.processor, session.config, limits, media_folder or media_folder_of(data))
    samples = ChatSamples(open_chats(data, split), encoder)
    found = {"chats": len(samples.chats), "usable": len(samples), "skipped": dict(samples.skipped.counts)}
    ordered = sorted(samples.lengths)
    columns = {"median": ordered[len(ordered) // 2], "largest": ordered[-1], "in all": sum(ordered)}
    if as_json:
        places = {"number": samples.places.num_places, "look_like_pixels": samples.places.are_pixels}
        print(json.dumps({**found, "places": places, "block_size": size, "max_length": max_length, "columns": columns}))
        return
    print(f"{counted(len(samples.chats), 'chat')}, {found['usable']:,} can be trained on")
    for reason, count in samples.skipped.counts.most_common():
        print(f"  skipped {count:,}: {reason}")
    print(f"columns of a packed row at block size {size}, of {max_length:,} at most:")
    print(f"  {columns['median']:,} in the middle, {columns['largest']:,} at most, {columns['in all']:,} in all")


EXAMPLES = """\
[bold]Examples[/bold]

bard-vl check chats.jsonl --model Bard-VL-4B

bard-vl check chats.jsonl --model Bard-VL-4B --max-pixels 1000000 --json
"""
