"""The averaged student: its formula, and that the network that is trained lends itself to it and is given back."""

import pytest
import torch

from engine import zero
from engine.averaging import AveragedWeights
from engine.models.pipelines import load_pipeline


def weights(trainer):
    return {name: value.clone() for name, value in zero.full_parameters(trainer.engine)}


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def predict(network) -> torch.Tensor:
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    dtype = next(parameter.dtype for parameter in network.parameters())
    with torch.no_grad():
        labels, timesteps = torch.tensor([0, 4, 9]), torch.tensor([900, 500, 20])
        return network(x.to(dtype), timesteps, class_labels=labels).sample


def separate_network(trainer, values) -> torch.nn.Module:
    """A network of its own with some weights, in the precision of the run."""
    network = load_pipeline(trainer.config.teacher.path).denoiser.network
    network.load_state_dict(values)
    return network.to(next(trainer.engine.module.parameters()).dtype)


def test_the_averaged_student_follows_its_formula(start):
    trainer = start("ema.decay=0.7")
    expected = {name: value.double() for name, value in weights(trainer).items()}
    for _ in range(3):
        trainer.train_iteration()
        expected = {name: 0.7 * expected[name] + 0.3 * value.double() for name, value in weights(trainer).items()}
    for name, value in expected.items():
        torch.testing.assert_close(trainer.averaged.values[name].double(), value, rtol=0, atol=1e-6)
    trained = weights(trainer)
    assert max(float((trained[name] - value).abs().max()) for name, value in expected.items()) > 1e-4


def test_the_student_itself_is_evaluated_without_averaging(start):
    trainer = start("ema.decay=0")
    trainer.train_iteration()
    assert equal(trainer.averaged.values, weights(trainer))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inside_the_network_is_the_averaged_student_and_after_it_the_trained_one(start, precision, stage):
    trainer = start(f"precision={precision}", f"zero.stage={stage}", "train.ratio_tolerance=0.05")
    for _ in range(2):
        trainer.train_iteration()
    trained, before = weights(trainer), predict(trainer.engine)
    averaged = {name: value.clone() for name, value in trainer.averaged.values.items()}
    with trainer.averaged.installed():
        assert torch.equal(predict(trainer.engine), predict(separate_network(trainer, averaged)))
        assert not torch.equal(predict(trainer.engine), before)
    assert torch.equal(predict(trainer.engine), before)
    assert equal(weights(trainer), trained)
    assert equal(trainer.averaged.values, averaged)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_evaluation_between_iterations_changes_nothing_of_the_training(start, precision):
    rows, trained = [], []
    for evaluated in (False, True):
        trainer = start(f"precision={precision}", "zero.stage=1", "train.ratio_tolerance=0.05")
        rows.append([])
        for _ in range(3):
            if evaluated:
                trainer.evaluate_held_out()
            row = trainer.train_iteration()
            rows[-1].append({name: value for name, value in row.items() if not name.startswith("time/")})
        trained.append(weights(trainer))
    assert rows[0] == rows[1]
    assert equal(*trained)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_run_is_evaluated_in_its_precision_with_the_averaged_weights(start, precision, dtype):
    trainer = start(f"precision={precision}", "train.ratio_tolerance=0.05")
    trainer.train_iteration()
    plain, seen = separate_network(trainer, trainer.averaged.values), []

    def compare(module, inputs, keywords, output):
        with torch.no_grad():
            expected = plain(*inputs, **keywords).sample
        seen.append((output.sample.dtype, torch.equal(output.sample, expected)))

    hook = trainer.engine.module.register_forward_hook(compare, with_kwargs=True)
    trainer.evaluate_held_out()
    hook.remove()
    assert seen == [(dtype, True)] * trainer.config.student.steps


def test_a_failure_inside_gives_the_trained_weights_back(start):
    trainer = start()
    trainer.train_iteration()
    trained = weights(trainer)
    with pytest.raises(KeyboardInterrupt), trainer.averaged.installed():
        raise KeyboardInterrupt
    assert equal(weights(trainer), trained)


def test_only_what_is_trained_is_averaged_and_held_in_fp32_on_the_host(start):
    trainer = start("student.trainable=conv_out", "precision=bf16", "train.ratio_tolerance=0.05")
    trainer.train_iteration()
    values = trainer.averaged.values
    assert sorted(values) == ["conv_out.bias", "conv_out.weight"]
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in values.values())


def test_fingerprints_are_of_names_and_values(start):
    trainer = start()
    first = trainer.averaged.fingerprint()
    assert AveragedWeights(trainer.engine, 0.5).fingerprint() == first  # the decay is none of the weights
    found = {first}
    for name in ("conv_in.weight", "conv_out.bias"):
        trainer.averaged.values[name].view(-1)[-1] += 1e-7
        found.add(trainer.averaged.fingerprint())
    trainer.averaged.values["other"] = trainer.averaged.values.pop("conv_out.bias")
    assert len(found | {trainer.averaged.fingerprint()}) == 4


def test_a_mean_of_other_weights_is_refused_and_of_the_same_goes_on(start):
    trainer = start()
    saved = {name: value.bfloat16() for name, value in trainer.averaged.values.items()}
    for wrong in (
        {name: value for name, value in saved.items() if name != "conv_out.bias"},
        saved | {"conv_out.bias": torch.zeros(2)},
    ):
        with pytest.raises(ValueError, match=r"1 averaged weights differ from the trained ones, as conv_out\.bias"):
            trainer.averaged.load(wrong)
    trainer.averaged.load(saved)
    assert equal(trainer.averaged.values, {name: value.float() for name, value in saved.items()})
