"""The plan's parameters, gradients and optimizer states, held against what DeepSpeed allocates."""

import pytest

from bench import plan_states

CASES = [
    *(f"zero.stage={stage} precision={precision}" for stage in range(4) for precision in ("fp32", "bf16")),
    *(
        f"zero.stage={stage} precision=bf16 optimizer.kind={kind}"
        for stage in (0, 2)
        for kind in ("adamw8bit", "lion", "lion8bit")
    ),
    *(f"zero.stage={stage} precision=bf16 zero.master_weights=bf16" for stage in (1, 2, 3)),
    *(f"zero.stage={stage} precision=bf16 frozen" for stage in range(4)),
    "zero.stage=1 precision=bf16 optimizer.kind=paged_adamw8bit",
]
OFFLOADED = [
    *(f"zero.stage={stage} precision=bf16 zero.offload=optimizer" for stage in (1, 2, 3)),
    "zero.stage=3 precision=bf16 zero.offload=parameters",
    "zero.stage=3 precision=bf16 frozen zero.offload=parameters",
]
ON_TWO = [
    *(f"zero.stage={stage} precision={precision}" for stage in range(4) for precision in ("fp32", "bf16")),
    "zero.stage=2 precision=bf16 frozen optimizer.kind=adamw8bit",
    "zero.stage=3 precision=bf16 optimizer.kind=adamw8bit",
    "zero.stage=3 precision=bf16 frozen",
]


@pytest.fixture(scope="module")
def tables():
    one = plan_states.table([case.split() for case in [*CASES, *OFFLOADED]], 1)
    two = plan_states.table([case.split() for case in [*ON_TWO, *OFFLOADED]], 2)
    return {(row["case"], row["ranks"]): row for row in [*one, *two]}


@pytest.mark.parametrize(("case", "ranks"), [*((case, 1) for case in CASES), *((case, 2) for case in ON_TWO)])
def test_every_kind_is_planned_to_the_byte(tables, case, ranks):
    row = tables[case, ranks]
    assert row["measured"]["parameters"] > 0
    assert row["measured"]["optimizer"] > 0
    assert row["measured"]["gradients"] > 0
    assert row["planned"] == row["measured"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", OFFLOADED)
def test_what_is_offloaded_is_planned_to_the_byte(tables, case, ranks):
    # where all memory is the host's, nothing tells a tensor of the one from one of the other, so their sum is held
    row = tables[case, ranks]
    assert sum(row["planned"].values()) == sum(row["measured"].values())


def test_offloading_moves_bytes_from_the_gpu_to_the_host():
    cases = ("zero.stage=3 precision=bf16", OFFLOADED[2], OFFLOADED[3])
    resident, optimizer, parameters = (plan_states.planned(case.split(), 2) for case in cases)
    assert resident.host == 0
    assert optimizer.optimizer == 0
    assert optimizer.parameters == resident.parameters
    assert parameters.parameters == 0
    assert 0 < optimizer.host < parameters.host
