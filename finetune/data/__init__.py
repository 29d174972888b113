"""From a folder of pictures to what a step trains on. Nothing here changes, moves or leaves out a user's file.

`read` (folder.py) lists every fault of a folder at once, before a model is loaded; `pixels` (examples.py) makes the
training square of one example; `pictures.py` knows picture files, `geometry.py` scaling and cropping, `summary.py`
what the user is told.
"""

from finetune.data.examples import Example, pixels
from finetune.data.folder import read, read_plain
from finetune.data.geometry import Geometry
from finetune.data.pictures import BadPicture, Facts
from finetune.data.summary import describe

__all__ = ["BadPicture", "Example", "Facts", "Geometry", "describe", "pixels", "read", "read_plain"]
