"""`aid`: what an aerial photograph shows, one of 30 scenes (Xia et al., TGRS 2017), in LLaVA's conversation format.

The answer is the name of the scene; it is right when its text is right but for case, punctuation and articles.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal

from eas_search.tasks.base import TaskOptions
from eas_search.tasks.vqa import Vqa, VqaOptions

SOURCE = "https://captain-whu.github.io/AID (AID.zip)"


class AidOptions(VqaOptions):
    """Options of `aid`, beside those of `vqa`.

    Attributes:
        group_by: field of a record that scores are broken down by.
        train: percentage of the pictures that are for training, where the folder holds annotations of both published
            divisions (aid_train20.json, aid_train50.json, …).
    """

    train: Literal[20, 50] = 20


class Aid(Vqa):
    """AID as a question with a short answer."""

    name: ClassVar[str] = "aid"
    Options: ClassVar[type[TaskOptions]] = AidOptions
    layout: ClassVar[str] = (
        "AID in LLaVA's format: a folder with aid_train20.json, aid_test20.json and images/SCENE/scene_N.jpg "
        f"(annotations: https://github.com/DoubtedSteam/EAS; images: {SOURCE})"
    )
    source: ClassVar[str] = SOURCE
    options: AidOptions

    def wanted(self, file: Path) -> bool:
        """Whether a file is of the wanted division, or of none."""
        share = re.search(r"(?:train|val|test)[_-]?(\d+)", file.stem.lower())
        return share is None or int(share[1]) == self.options.train
