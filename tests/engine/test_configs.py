"""The shipped configurations: each is planned to fit the card that its name says, from config.json files alone."""

import re

import pytest

from engine import load_config
from engine.config import CONFIGS
from engine.plan import plan

GIB = 2**30
CARDS = {
    "sd15_8gb": 8,
    "sdxl_24gb": 24,
    "sd35_medium_16gb": 16,
    "flux_24gb": 24,
    "dit_xl2_8gb": 8,
}
PARAMETERS = {
    "sd15_8gb": 859_520_964,
    "sdxl_24gb": 2_567_463_684,
    "sd35_medium_16gb": 2_243_171_520,
    "flux_24gb": 11_901_408_320,
    "dit_xl2_8gb": 749_826_464,
}
"""Of the public denoising networks."""


def test_every_shipped_configuration_is_listed_here():
    assert {file.stem for file in CONFIGS.glob("*.yaml") if not file.stem.startswith("digits")} == {*CARDS}


@pytest.mark.parametrize("name", CARDS)
def test_a_shipped_configuration_is_planned_to_fit_its_card_as_its_head_says(name):
    file = CONFIGS / f"{name}.yaml"
    made = plan(load_config(file), gpu_bytes=CARDS[name] * GIB)
    assert made.fits
    stated = re.search(r"Planned peak ([0-9.]+) GiB in the phase \"(.+)\"", file.read_text().replace("\n# ", " "))
    assert stated is not None
    assert float(stated[1]) == pytest.approx(made.memory.worst.total / GIB, abs=0.15)
    assert stated[2] == made.memory.worst.name


@pytest.mark.parametrize("name", CARDS)
def test_the_shipped_architecture_has_the_public_number_of_parameters(name):
    import diffusers
    import torch

    from engine.models.families import FAMILIES
    from engine.models.loading import read_json
    from engine.planning.networks import locate

    directory = locate(load_config(CONFIGS / f"{name}.yaml").teacher.path)
    pipeline = read_json(directory, "model_index.json")["_class_name"]
    family = next(family for family in FAMILIES if pipeline in family.pipelines)
    with torch.device("meta"):
        network = getattr(diffusers, family.network).from_config(
            read_json(directory, f"{family.component}/config.json")
        )
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("digits_*.yaml")), ids=lambda file: file.stem)
def test_a_configuration_of_the_digits_is_named_for_its_objectives(file):
    assert "_".join(load_config(file).objective.kinds) == file.stem.removeprefix("digits_")
