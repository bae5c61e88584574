"""bench.plan: without a GPU it says so, and on one the plan holds."""

import json

import pytest
import torch

from bench import plan


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what is said without a GPU")
def test_without_a_gpu_it_ends_with_status_2_and_names_what_a_cpu_can_measure(capsys):
    assert plan.main([]) == 2
    assert "bench.plan_states" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_shipped_configuration_stays_within_a_tenth_of_its_plan_under_its_cards_memory_cap(tmp_path):
    file = tmp_path / "plan.json"
    assert plan.main(["dit_xl2_8gb", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["allocated"] <= row["card"]
    assert row["planned_over_allocated"] == pytest.approx(1, abs=0.1)
