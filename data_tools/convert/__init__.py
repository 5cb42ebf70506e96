"""Published data sets → the one form of records: `python -m data_tools.convert SOURCE --out DIR`.

`recognise.py` says what a source is, the modules named after a form read its rows, `entries.py`
makes records of them, `images.py` finds and checks their images, `pipeline.py` and `output.py`
write them.
"""

# First, because the others take seconds, in which Ctrl-C should not show a traceback.
from nanovlm.utils import interruption  # noqa: F401
