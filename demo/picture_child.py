"""Decodes one picture in a process of its own: a hostile file can crash, hang or fill this process, not the server.

Started by demo/door.py. Imports no torch, so that it starts quickly.

    argv[1]   JSON: path, formats (Pillow's names), pixels, memory (bytes), seconds
    stdout    one JSON line: {width, height, format, frames, orientation} or {error}
"""

import json
import math
import os
import struct
import sys
import warnings
import zlib
from typing import Any

from PIL import Image


def limit(memory: int, seconds: float) -> None:
    """No more memory, time, files or cores than a picture needs."""
    try:
        import resource
    except ImportError:
        return  # not on this system; the parent's clock still holds
    wanted = [
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, math.ceil(seconds) + 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 16),
    ]
    for what, value in wanted:
        try:
            resource.setrlimit(what, (value, value))
        except (ValueError, OSError):
            continue  # a harder limit is already set


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Size of the picture, after all of its first frame was decoded."""
    Image.MAX_IMAGE_PIXELS = None  # our own limit follows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on files that are read all the same
        with Image.open(request["path"], formats=request["formats"]) as picture:
            width, height = picture.size
            if width * height > request["pixels"]:
                return {"error": f"{width} x {height} pixels are more than the {request['pixels']:,} allowed here"}
            kind = picture.format or "?"
            frames = int(getattr(picture, "n_frames", 1)) if kind != "GIF" else 1  # counting a GIF's decodes them all
            picture.seek(0)
            picture.load()
            orientation = picture.getexif().get(0x0112, 1)
    if width < 1 or height < 1:
        return {"error": "it has no pixels"}
    turned = orientation if isinstance(orientation, int) else 1
    return {"width": width, "height": height, "format": kind, "frames": frames, "orientation": turned}


def main() -> None:
    request = json.loads(sys.argv[1])
    limit(request["memory"], request["seconds"])
    out = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # decoders print what they like
    os.dup2(silence, 2)
    try:
        answer = measure(request)
    except MemoryError:
        answer = {"error": f"decoding it needs more than {request['memory'] / 2**20:.0f} MB of memory"}
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, RuntimeError) as error:
        answer = {"error": _reason(error)}
    except (struct.error, zlib.error) as error:
        answer = {"error": _reason(error)}
    out.write(json.dumps(answer) + "\n")
    out.flush()


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, Image.UnidentifiedImageError) or not text.isprintable():
        text = ""
    return (text[:120] if text else "") or "it is damaged or not a picture"


if __name__ == "__main__":
    main()
