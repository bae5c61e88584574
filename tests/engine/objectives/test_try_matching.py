import pytest
@pytest.mark.parametrize("kind", ["diff_instruct","dmd2","flash_dmd"])
@pytest.mark.parametrize("stage", [0,3])
def test_run(start, kind, stage):
    t = start(f"objective.kind={kind}", "student.sampler=renoise", f"zero.stage={stage}", "train.batch_size=4","train.micro_batch=2", "student.steps=3")
    for _ in range(2):
        m = t.train_iteration()
    print({k:v for k,v in m.items() if not k.startswith("time")})
