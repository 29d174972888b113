"""From a folder of pictures to what a step trains on. Nothing here changes, moves or leaves out a user's file.

`read` (sources.py) lists every fault of all folders and data sets at once, before a model is loaded; `plan` decides how
each picture is scaled, cropped and captioned; `pixels` (examples.py) makes what is trained; `summary.py` says what the
user is told. Below them: `folder.py`, `metadata.py` and `library.py` find pictures, `pictures.py` decodes one.
"""

from finetune.data.checking.doctor import require
from finetune.data.examples import Example, Item, pixels
from finetune.data.framing.geometry import Geometry
from finetune.data.plan import plan
from finetune.data.reading.pictures import BadPicture, Facts
from finetune.data.reading.sources import held_out, read, read_files, read_plain, survey
from finetune.data.summary import describe, prompts

__all__ = [
    "BadPicture",
    "Example",
    "Facts",
    "Geometry",
    "Item",
    "describe",
    "held_out",
    "pixels",
    "plan",
    "prompts",
    "read",
    "read_files",
    "read_plain",
    "require",
    "survey",
]
