"""The check before a fit: its table, on one device and on strategies that are chosen but not started."""

import importlib.util
import time
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy

import lightning_tricks
from lightning_tricks import callbacks as ours
from lightning_tricks.callbacks._base import TrickCallback
from lightning_tricks.engines import Rule, Trick, check_before_fit, engine_of
from lightning_tricks.engines import check as check_of_engines
from lightning_tricks.engines._capabilities import REFUSALS
from lightning_tricks.engines._rules import CIRCUMSTANCES, RULES, rules_table
from lightning_tricks.errors import DegradedWarning, MisconfigurationError, UnsupportedError
from tests.engines.checks import Net

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")


def quiet(*callbacks, **options):
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "max_steps": 2}
    return L.Trainer(**{**defaults, **options}, callbacks=list(callbacks))


class Validated(Net):
    def validation_step(self, batch, index):
        self.log("val/loss", self.training_step(batch, index))

    def val_dataloader(self):
        return self.train_dataloader()


class Manual(Net):
    """Two optimizers, each stepping its own half, as their norms tell."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.enter, self.head)]

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


class Averaging(TrickCallback):
    """Stands for a callback that averages shards."""

    trick = Trick(jobs=("average weights",), needs=("named_shards", "put_shards"))


def verdicts(report):
    return {found.trick: found.verdict for found in report}


def one(report, trick):
    (found,) = [found for found in report if found.trick == trick]
    return found


# -- the report ----------------------------------------------------------------------------------------------------


def test_every_trick_and_option_in_use_has_a_line(tmp_path):
    tricks = [ours.GradientClipping(), ours.EarlyStopping(), ours.CheckpointEnsemble(), L.Callback()]
    report = lightning_tricks.check(quiet(*tricks, accumulate_grad_batches=4), Validated())
    assert verdicts(report) == dict.fromkeys(
        [
            "GradientClipping",
            "EarlyStopping",
            "CheckpointEnsemble",
            "`Trainer(accumulate_grad_batches=4)`",
            "precision '32-true'",
        ],
        "exact",
    )
    assert {found.engine for found in report} == {"one_device"}
    assert report.verdict == "exact"
    assert str(report).splitlines()[0].split() == ["GradientClipping", "one_device", "exact"]
    assert check_of_engines is lightning_tricks.check


def test_check_changes_nothing_and_costs_milliseconds():
    trainer, module = quiet(ours.GradientClipping()), Validated()
    lightning_tricks.check(trainer, module)
    begin = time.process_time()
    for _ in range(20):
        lightning_tricks.check(trainer, module)
    assert (time.process_time() - begin) / 20 < 0.05
    assert trainer.lightning_module is None
    assert trainer.train_dataloader is None


@pytest.mark.parametrize("strategy", ["fsdp2", *(pytest.param(f"zero_{s}", marks=needs_deepspeed) for s in (1, 2, 3))])
def test_the_engine_is_known_before_anything_starts(strategy):
    report = lightning_tricks.check(quiet(ours.GradientClipping(), strategy=strategy), Net())
    assert [(found.engine, found.verdict) for found in report] == [(strategy, "exact")] * 2


def test_a_foreign_trainer_is_refused():
    with pytest.raises(MisconfigurationError, match="got str: `from lightning import Trainer`"):
        lightning_tricks.check("trainer", Net())


def test_a_strategy_without_an_engine_refuses_each_trick():
    class Other(type(quiet().strategy).__mro__[1]):  # Lightning's abstract Strategy
        pass

    Other.__abstractmethods__ = frozenset()
    trainer = quiet(ours.GradientClipping(), ours.EarlyStopping())
    trainer._accelerator_connector.strategy = Other()
    report = lightning_tricks.check(trainer, Validated())
    assert verdicts(report) == {"GradientClipping": "refused", "EarlyStopping": "refused"}
    assert "no engine for this strategy" in one(report, "EarlyStopping").reason


# -- the table -----------------------------------------------------------------------------------------------------


def test_the_page_holds_the_table():
    """When this fails, paste `rules_table()` between the two comments of docs/engines.md."""
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    _, _, rest = page.partition("<!-- rendered from engines/_rules.py -->\n\n")
    assert rest.partition("\n<!-- end of the rules -->")[0] == rules_table()


def test_circumstances_are_those_of_refusals_that_exist():
    assert set(CIRCUMSTANCES) <= set(REFUSALS)
    assert all(rule.who for rule in RULES)


def test_a_trick_brings_its_own_rule():
    rule = Rule(
        when=lambda now, used: {"name": now.precision}, verdict="degraded", words="{trick}, {name}", remedy="no"
    )

    class Own(TrickCallback):
        trick = Trick(rules=(rule,))

    class Inherits(Own):
        pass

    found = one(lightning_tricks.check(quiet(Inherits()), Net()), "Inherits")
    assert (found.verdict, found.reason, found.remedy) == ("degraded", "Inherits, 32-true", "no")
    with pytest.warns(DegradedWarning, match=r"on one_device:\n- Inherits: Inherits, 32-true: no\."):
        quiet(Inherits()).fit(Net())


# -- clipping ------------------------------------------------------------------------------------------------------


class Half:
    """A policy of another class: Lightning itself refuses two callbacks with one key."""

    def limit(self, norm):
        return 0.5


@pytest.mark.parametrize(
    ("callbacks", "options", "names"),
    [
        ([1.0, Half()], {}, "GradientClipping and GradientClipping both clip gradients: remove one"),
        ([1.0], {"gradient_clip_val": 0.5}, r"GradientClipping and `Trainer\(gradient_clip_val=0.5\)` both clip grad"),
    ],
)
def test_two_that_clip_are_refused_in_a_fit(callbacks, options, names):
    module = Net()
    trainer = quiet(*map(ours.GradientClipping, callbacks), **options)
    with pytest.raises(MisconfigurationError, match=names):
        trainer.fit(module)
    assert module.seen == 0


def test_all_that_is_refused_is_told_at_once():
    trainer = quiet(ours.GradientClipping(), ours.EarlyStopping(), gradient_clip_val=0.5)
    report = lightning_tricks.check(trainer, Net())
    assert [found.trick for found in report.of("refused")] == ["GradientClipping", "EarlyStopping"]
    with pytest.raises(
        MisconfigurationError, match=r"2 things stand in the way.*\n- Grad.*both clip.*\n- EarlyStopping"
    ):
        trainer.fit(Net())


def test_manual_optimisation_clips_at_each_step_of_each_optimizer():
    trainer = quiet(ours.GradientClipping(0.01))
    assert verdicts(lightning_tricks.check(trainer, Manual()))["manual optimisation"] == "exact"
    module, plain = Manual(), Manual()
    trainer.fit(module)
    quiet().fit(plain)
    norms = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert min(norms["grad_norm/total/optimizer_0"], norms["grad_norm/total/optimizer_1"]) > 0.01
    moved = (module.head.weight - Net().head.weight).norm()
    assert 0 < moved <= 1.01 * 0.1 * 0.01  # one step of each optimizer: learning rate times limit
    assert (plain.head.weight - Net().head.weight).norm() > 10 * moved


def test_manual_optimisation_beside_what_lightning_does_by_itself():
    report = lightning_tricks.check(quiet(gradient_clip_val=1.0, accumulate_grad_batches=2), Manual())
    assert [found.verdict for found in report][:2] == ["refused", "refused"]


# -- what is known once the optimizers are built ---------------------------------------------------------------------


def scaled(*callbacks):
    return quiet(*callbacks, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])


class Fused(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=True)


def test_a_fused_optimizer_is_told_to_be_unknown_and_refused_once_it_is_built():
    trainer, module = scaled(ours.GradientClipping()), Fused()
    found = one(lightning_tricks.check(trainer, module), "GradientClipping")
    assert (found.verdict, found.reason) == (
        "exact",
        "a fused optimizer would be refused, which is known once it is built",
    )
    with pytest.raises(UnsupportedError, match=r"fused AdamW .* pass `fused=False`"):
        trainer.fit(module)
    assert module.seen == 0


def test_a_second_fit_is_checked_with_its_own_optimizers():
    trainer = scaled(ours.GradientClipping())
    trainer.fit(Net())
    with pytest.raises(UnsupportedError, match="fused AdamW"):
        trainer.fit(Fused())


def test_lbfgs_is_refused_before_the_first_step():
    class Closure(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    module = Closure()
    with pytest.raises(UnsupportedError, match="LBFGS: one step evaluates several gradients"):
        quiet(ours.GradientClipping()).fit(module)
    assert module.seen == 0


# -- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "precision", "words"),
    [
        ("auto", "bf16-true", "weights, gradients and moments are bf16 themselves, without fp32 masters"),
        ("fsdp2", "16-true", "weights, gradients and moments are fp16 themselves"),
        pytest.param("zero_2", "bf16-true", "so that it is 'bf16-mixed'", marks=needs_deepspeed),
        ("auto", "64-true", "tests do not cover it"),
    ],
)
def test_true_low_precision_is_degraded(strategy, precision, words):
    report = lightning_tricks.check(quiet(strategy=strategy, precision=precision), Net())
    found = one(report, f"precision '{precision}'")
    assert found.verdict == "degraded"
    assert words in found.reason


def test_what_is_degraded_warns_once_and_trains(tmp_path):
    trainer = quiet(ours.GradientClipping(), ours.EarlyStopping(), precision="bf16-true", default_root_dir=tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Validated(batches=2))
    told = [f"{warning.message}" for warning in caught if warning.category is DegradedWarning]
    assert len(told) == 1
    assert "- precision 'bf16-true': weights, gradients and moments are bf16 themselves" in told[0]
    assert trainer.global_step == 2


# -- Lightning's own callbacks ---------------------------------------------------------------------------------------


def test_lightnings_early_stopping_beside_ours_is_degraded(tmp_path):
    # With one metric and direction Lightning refuses the two by itself: their keys in a checkpoint are the same.
    trainer = quiet(ours.EarlyStopping(), EarlyStopping("val/f1", strict=False), default_root_dir=tmp_path)
    report = lightning_tricks.check(trainer, Validated())
    assert verdicts(report)["EarlyStopping"] == "degraded"
    assert verdicts(report)["Lightning's EarlyStopping"] == "exact"
    with pytest.warns(DegradedWarning, match="EarlyStopping and Lightning's EarlyStopping both stop the fit"):
        trainer.fit(Validated(batches=2))


def test_two_of_ours_may_watch_two_metrics():
    trainer = quiet(ours.EarlyStopping("val/loss"), ours.EarlyStopping("val/f1"))
    assert lightning_tricks.check(trainer, Validated()).verdict == "exact"


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lightnings_callbacks_that_deepspeed_cannot_have(stage):
    trainer = quiet(StochasticWeightAveraging(1e-2), GradientAccumulationScheduler({1: 2}), strategy=f"zero_{stage}")
    found = verdicts(lightning_tricks.check(trainer, Net()))
    assert found["Lightning's StochasticWeightAveraging"] == "refused"
    assert found["Lightning's GradientAccumulationScheduler"] == "refused"


@needs_deepspeed
def test_lightnings_own_deepspeed_strategy_accumulates_otherwise():
    for strategy, verdict in ((DeepSpeedStrategy(stage=2), "degraded"), ("zero_2", "exact")):
        report = lightning_tricks.check(quiet(strategy=strategy, accumulate_grad_batches=2), Net())
        assert one(report, "`Trainer(accumulate_grad_batches=2)`").verdict == verdict


# -- DeepSpeed's configuration ---------------------------------------------------------------------------------------


def with_config(*callbacks, clip=None, stage=2, **entries):
    trainer = quiet(*callbacks, strategy=f"zero_{stage}", gradient_clip_val=clip)
    trainer.strategy.config.update(entries)
    return trainer


@needs_deepspeed
@pytest.mark.parametrize(
    ("callbacks", "clip", "threshold", "verdict"),
    [
        ([ours.GradientClipping()], None, 0.5, "refused"),
        ([], 1.0, 0.5, "refused"),
        ([], 1.0, 0.0, "refused"),  # it would switch the Trainer's clipping off
        ([], 1.0, 1.0, "exact"),  # what Lightning writes there
        ([ours.GradientClipping()], None, 0.0, "exact"),
    ],
)
def test_deepspeeds_own_threshold_contradicts(callbacks, clip, threshold, verdict):
    trainer = with_config(*callbacks, clip=clip, gradient_clipping=threshold)
    report = lightning_tricks.check(trainer, Net())
    assert report.verdict == verdict
    if verdict == "refused":
        first = "GradientClipping" if callbacks else "`Trainer(gradient_clip_val=1.0)`"
        expected = f"{first} and the DeepSpeed configuration (`gradient_clipping: {threshold}`) both clip gradients"
        assert one(report, first).reason == expected
    elif callbacks:
        engine_of(trainer).claim_gradient_clipping("GradientClipping")


@needs_deepspeed
def test_averaging_beside_an_optimizer_on_nvme_is_refused():
    offload = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}
    trainer = with_config(Averaging(), ours.GradientClipping(), stage=3, zero_optimization=offload)
    report = lightning_tricks.check(trainer, Net())
    assert one(report, "GradientClipping").verdict == "exact"
    assert one(report, "Averaging").verdict == "refused"
    assert one(report, "Averaging").remedy == "offload to the CPU"
    assert lightning_tricks.check(quiet(Averaging(), strategy="zero_3"), Net()).verdict == "exact"


# -- who runs it -------------------------------------------------------------------------------------------------------


class Counting(TrickCallback):
    """Counts how often its rule is asked."""

    trick = Trick(rules=(Rule(when=lambda now, used: used.source.ask(), verdict="refused", words="", remedy=""),))

    def __init__(self, name):
        self.name, self.count = name, 0

    def _identity(self):
        return {"name": self.name}

    def ask(self):
        self.count += 1


def test_the_first_in_a_fit_runs_it_and_no_other():
    first, second = Counting("first"), Counting("second")
    trainer = quiet(first, second)
    trainer.fit(Net())
    assert (first.count, second.count) == (2, 2)  # when the fit is set up, and when the optimizers are built
    check_before_fit(trainer, second)
    assert (first.count, second.count) == (2, 2)
    trainer.fit(Net(batches=1))
    assert (first.count, second.count) == (4, 4)


def test_an_evaluation_is_not_checked():
    trainer = quiet(ours.GradientClipping(), gradient_clip_val=1.0)
    trainer.test(Net(), verbose=False)
