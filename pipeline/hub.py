"""Trained models on the Hugging Face hub, `hf-hub:ORG/NAME`. Files are downloaded; nothing in them is run."""

from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError, reason

HUB = "hf-hub:"


def on_the_hub(name: str, files: Sequence[str], setting: str) -> Path:
    """The folder in huggingface_hub's cache that holds `files` of `hf-hub:ORG/NAME`, downloaded where they are not yet.

    Environment variables such as HF_HUB_OFFLINE, HF_HOME and HF_TOKEN apply.

    Args:
        setting: where the user gave the name, for the message.

    Raises:
        UserError: there is no such model, or it can be neither found in the cache nor downloaded.
    """
    from huggingface_hub import snapshot_download  # only here: most commands need no hub

    try:
        return Path(snapshot_download(name.removeprefix(HUB), allow_patterns=list(files)))
    except Exception as error:  # of the network, the hub, the disk or the name: each of its own type
        raise UserError(
            f"{setting} {name} is not in the Hugging Face cache and cannot be downloaded ({reason(error)}): check the "
            "name, connect once, or give a local folder"
        ) from error
