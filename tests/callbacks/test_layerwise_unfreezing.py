"""LayerwiseUnfreezing on one device: against plain torch, through an interruption, and what it refuses."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

from lightning_tricks.callbacks import Epochs, GradientClipping, LayerwiseUnfreezing, Seconds, Steps
from lightning_tricks.callbacks._layer_groups import split_by_layer
from lightning_tricks.callbacks._layers import find_layers, ids_by_layer
from lightning_tricks.data import TricksDataLoader
from lightning_tricks.errors import CheckpointError, MisconfigurationError

ORDER = ["head", "blocks.1", "blocks.0", "enter"]
BATCHES, EPOCHS, RATE, DECAY = 3, 5, 0.05, 0.1


class Net(L.LightningModule):
    """Layers in the order of its forward pass, three batches an epoch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.enter = nn.Linear(4, 5)
        self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=DECAY)

    def train_dataloader(self):
        return TricksDataLoader(TensorDataset(*data()), batch_size=6, shuffle=False, seed=0)


def data():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6 * BATCHES, 4, generator=generator), torch.randint(2, (6 * BATCHES,), generator=generator)


def in_plain_torch(due, *, factor=1.0, limit=None, window=1, steps=BATCHES * EPOCHS):
    """The paper's procedure by `requires_grad`, with an optimizer that is given a layer when it thaws."""
    module = Net()
    layers = [list(module.get_submodule(name).parameters()) for name in ORDER]
    module.requires_grad_(False)
    optimizer, norms = None, []
    inputs, targets = data()
    for step in range(steps):
        thawed = min(due(step), len(layers))
        for depth in range(thawed):
            if not layers[depth][0].requires_grad:
                for parameter in layers[depth]:
                    parameter.requires_grad_(True)
                group = {"params": layers[depth], "lr": RATE / factor**depth}
                if optimizer is None:
                    optimizer = torch.optim.AdamW([group], weight_decay=DECAY)
                else:
                    optimizer.add_param_group(group)
        optimizer.zero_grad()
        for micro in range(window):
            at = 6 * ((step * window + micro) % BATCHES)
            loss = module.training_step((inputs[at : at + 6], targets[at : at + 6]), 0)
            (loss / window).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), limit or 1e9).item())
        optimizer.step()
    return module, norms


class Norms(L.Callback):
    def __init__(self):
        self.norms, self.layers = [], []

    def on_train_batch_end(self, trainer, *_):
        self.norms.append(trainer.callback_metrics["grad_norm/total"].item())
        self.layers.append(trainer.callback_metrics["unfreezing/layers"].item())


def same(found, expected):
    for (name, own), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(own, other, atol=1e-6), name


def test_each_epoch_thaws_a_layer_as_in_plain_torch(trainer):
    module, watch = Net(), Norms()
    callbacks = [watch, GradientClipping(0.2), LayerwiseUnfreezing(order=ORDER, factor=2.6)]
    trainer(callbacks, max_epochs=EPOCHS).fit(module)
    expected, norms = in_plain_torch(lambda step: 1 + step // BATCHES, factor=2.6, limit=0.2)
    same(module, expected)
    assert watch.norms == pytest.approx(norms, rel=1e-5), "the norm is not that of the thawed layers"
    assert sum(norm > 0.2 for norm in norms) > 5
    assert watch.layers == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 6


def test_steps_thaw_with_accumulation(trainer):
    module = Net()
    unfreezing = LayerwiseUnfreezing(Steps(2), order=ORDER, start=2)
    trainer([unfreezing], max_epochs=2, accumulate_grad_batches=3).fit(module)
    expected, _ = in_plain_torch(lambda step: 2 + step // 2, window=3, steps=2)
    same(module, expected)
    assert unfreezing.thawed == 2


class Watch(L.Callback):
    """After each step the step counts of Adam by layer, and what has moved."""

    def __init__(self, first):
        self.first, self.counts, self.moved = first, [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = trainer.optimizers[0].state
        now = [list(pl_module.get_submodule(name).parameters()) for name in ORDER]
        then = [list(self.first.get_submodule(name).parameters()) for name in ORDER]
        self.counts.append([int(state[own[0]]["step"]) if own[0] in state else 0 for own in now])
        self.moved.append([not torch.equal(own[0], was[0]) for own, was in zip(now, then, strict=True)])


def test_a_frozen_layer_has_no_moments_and_does_not_decay(trainer):
    watch = Watch(Net())
    trainer([LayerwiseUnfreezing(order=ORDER), watch], max_epochs=3).fit(Net())
    assert watch.counts[2] == [3, 0, 0, 0]
    assert watch.counts[-1] == [9, 6, 3, 0]
    assert watch.moved[2] == [True, False, False, False]
    assert watch.moved[-1] == [True, True, True, False]


# -- through an interruption -------------------------------------------------------------------------------------------


class Save(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Lightnings(BaseFinetuning):
    """Thaws the second block at the second epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.enter, pl_module.blocks])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.blocks[1], optimizer)


class Thawed(Net):
    """Its optimizer holds what requires a gradient, as BaseFinetuning wants."""

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=RATE)


@pytest.mark.filterwarnings("ignore")
def test_lightnings_own_freezes_again_on_resume(trainer, tmp_path):
    """The trap: after a resume the layer that was thawed stands still."""
    path = tmp_path / "one.ckpt"
    trainer([Lightnings(), Save(6, path)], max_epochs=3).fit(whole := Thawed())
    trainer([Lightnings()], max_epochs=3).fit(resumed := Thawed(), ckpt_path=path)
    saved = torch.load(path, weights_only=True)["state_dict"]["blocks.1.weight"]
    assert not torch.equal(whole.blocks[1].weight, saved)
    assert torch.equal(resumed.blocks[1].weight, saved)


@pytest.mark.parametrize("step", [3, 4, 6, 13])
def test_stays_thawed_on_resume(trainer, tmp_path, step):
    """Between epochs and within one: weights and moments of a fit without interruption, bit for bit."""
    path = tmp_path / "one.ckpt"
    first = trainer([LayerwiseUnfreezing(order=ORDER), Save(step, path)], max_epochs=EPOCHS)
    first.fit(whole := Net())
    second = trainer([unfreezing := LayerwiseUnfreezing(order=ORDER)], max_epochs=EPOCHS)
    second.fit(resumed := Net(), ckpt_path=path)
    assert unfreezing.thawed == 4
    for (name, own), other in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(own, other), name
    counts = [int(second.optimizers[0].state[p]["step"]) for p in (resumed.enter.weight, resumed.head.weight)]
    assert counts == [int(first.optimizers[0].state[p]["step"]) for p in (whole.enter.weight, whole.head.weight)]


def test_never_freezes_again_under_a_slower_schedule(trainer, tmp_path):
    path = tmp_path / "one.ckpt"
    trainer([LayerwiseUnfreezing(order=ORDER), Save(9, path)], max_epochs=3).fit(Net())
    slow = LayerwiseUnfreezing(Epochs(100), order=ORDER)
    trainer([slow], max_epochs=4).fit(Net(), ckpt_path=path)
    assert slow.thawed == 3


def test_a_checkpoint_of_other_layers_is_refused(trainer, tmp_path):
    path = tmp_path / "one.ckpt"
    trainer([LayerwiseUnfreezing(order=ORDER), Save(3, path)], max_epochs=1).fit(Net())
    other = LayerwiseUnfreezing(order=["head", "enter", "blocks.1", "blocks.0"])
    with pytest.raises(CheckpointError, match="was saved with the layers"):
        trainer([other], max_epochs=2).fit(Net(), ckpt_path=path)


# -- parameter groups and schedules ------------------------------------------------------------------------------------


class Grouped(Net):
    """Vectors do not decay; the head learns faster; a parameter that requires no gradient is in a group as well."""

    def __init__(self):
        super().__init__()
        self.blocks[0].weight.requires_grad_(False)

    def configure_optimizers(self):
        head, rest = list(self.head.parameters()), [p for n, p in self.named_parameters() if "head" not in n]
        return torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.5},
                {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
                {"params": head, "lr": 1.0},
            ],
            lr=RATE,
        )


def test_the_users_groups_keep_their_settings(trainer):
    fitted = trainer([LayerwiseUnfreezing(order=ORDER, factor=2.0)], max_epochs=4)
    fitted.fit(module := Grouped())
    found = {id(p): group for group in fitted.optimizers[0].param_groups for p in group["params"]}
    settings = {name: (found[id(p)]["lr"], found[id(p)]["weight_decay"]) for name, p in module.named_parameters()}
    assert settings["head.weight"] == (1.0, 0.01)
    assert settings["blocks.1.weight"] == (RATE / 2, 0.5)
    assert settings["blocks.1.bias"] == (RATE / 2, 0.0)
    assert settings["blocks.0.bias"] == (RATE / 4, 0.0)
    assert settings["enter.weight"] == (RATE / 8, 0.5)
    assert all(group["params"] for group in fitted.optimizers[0].param_groups)
    assert torch.equal(module.blocks[0].weight, Grouped().blocks[0].weight)


def named_groups(module):
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=RATE)


def test_named_parameters_keep_their_names():
    module = Net()
    optimizer, layers = named_groups(module), find_layers(module, ORDER)
    split_by_layer(optimizer, ids_by_layer(module, layers), 1.0)
    assert [group["param_names"] for group in optimizer.param_groups] == list(layers.values())
    split_by_layer(optimizer, ids_by_layer(module, layers), 2.0)
    assert {group["lr"] for group in optimizer.param_groups} == {RATE}, "cut twice"


def scaled(rate, groups):
    return [rate / 2.0**depth for depth in range(groups)] if groups > 1 else rate


SCHEDULES = {
    "lambda": lambda o, n: lr_scheduler.LambdaLR(o, [lambda step: 0.9**step] * n),
    "step": lambda o, n: lr_scheduler.StepLR(o, 2),
    "cosine": lambda o, n: lr_scheduler.CosineAnnealingLR(o, 6),
    "one_cycle": lambda o, n: lr_scheduler.OneCycleLR(o, scaled(0.3, n), total_steps=8),
    "cyclic": lambda o, n: lr_scheduler.CyclicLR(o, scaled(0.01, n), scaled(0.1, n), step_size_up=2),
    "plateau": lambda o, n: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o, n: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.2, total_iters=2), lr_scheduler.ExponentialLR(o, 0.8)], [2]
    ),
    "chained": lambda o, n: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_as_one_of_the_cut_groups(name):
    """The reference is torch's own, made of an optimizer whose groups were cut before."""
    module = Net()
    cut = torch.optim.SGD(
        [
            {"params": module.get_submodule(layer).parameters(), "lr": rate}
            for layer, rate in zip(ORDER, scaled(RATE, 4), strict=True)
        ],
        lr=RATE,
        momentum=0.9,
    )
    expected = SCHEDULES[name](cut, 4)
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9)
    schedule = SCHEDULES[name](optimizer, 1)
    configured = {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
    split_by_layer(configured, ids_by_layer(module, find_layers(module, ORDER)), 2.0)
    for _ in range(8):
        rates = [[group["lr"] for group in one.param_groups] for one in (optimizer, cut)]
        assert rates[0] == pytest.approx(rates[1])
        assert [g["momentum"] for g in optimizer.param_groups] == [g["momentum"] for g in cut.param_groups]
        for one in (schedule, expected):
            one.step(1.0) if name == "plateau" else one.step()
    schedule.load_state_dict(expected.state_dict())


class Own(lr_scheduler.LRScheduler):
    def get_lr(self):
        return [0.1 for _ in self.base_lrs]


def test_a_schedule_that_is_not_torchs_is_refused():
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    ids = ids_by_layer(module, find_layers(module, ORDER))
    with pytest.raises(MisconfigurationError, match=r"cannot tell a Own so.*use one of torch\.optim\.lr_scheduler"):
        split_by_layer(([optimizer], [Own(optimizer)]), ids, 1.0)
    cut = torch.optim.SGD([{"params": module.get_submodule(name).parameters()} for name in ORDER], lr=RATE)
    split_by_layer(([cut], [Own(cut)]), ids, 1.0)


# -- layers ------------------------------------------------------------------------------------------------------------


def test_layers_are_found_by_blocks():
    assert find_layers(Net(), None) == {
        "above the blocks": ["head.weight", "head.bias"],
        "blocks.1": ["blocks.1.weight", "blocks.1.bias"],
        "blocks.0": ["blocks.0.weight", "blocks.0.bias"],
        "below the blocks": ["enter.weight", "enter.bias"],
    }


def test_what_is_frozen_is_in_no_layer():
    """Also where the last block is."""
    module = Net()
    module.blocks.requires_grad_(False)
    assert list(find_layers(module, None)) == ["above the blocks", "below the blocks"]


@pytest.mark.filterwarnings("ignore")
def test_blocks_of_a_compiled_part():
    module = Net()
    for number in range(2):
        module.blocks[number] = torch.compile(module.blocks[number], backend="eager")
    assert find_layers(module, None)["blocks.1"] == ["blocks.1.weight", "blocks.1.bias"]


def test_several_patterns_make_one_layer():
    layers = find_layers(Net(), [["head", "blocks.1.bias"], "blocks.*.weight", "enter", "blocks.0.bias"])
    assert list(layers) == ["head, blocks.1.bias", "blocks.*.weight", "enter", "blocks.0.bias"]
    assert layers["head, blocks.1.bias"] == ["head.weight", "head.bias", "blocks.1.bias"]


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(4, 5)
        self.decoder.weight = self.enter.weight


@pytest.mark.parametrize(
    ("module", "order", "message"),
    [
        (Net, ["head", "blocks.1", "blocks.0"], r"`enter.weight` of Net is in no layer of `order`: add it to one"),
        (Net, ["head", "body", "enter"], r"`order` .*`body` selects no trained parameter of Net"),
        (Net, ["head", "blocks", "blocks.0", "enter"], r"`blocks.0.weight` is in two layers of `order`, `blocks`"),
        (Net, ["head", "head"], "`head` twice"),
        (Net, ["*"], "has 1 layer"),
        (Tied, None, r"`enter.weight` and `decoder.weight` are one parameter, tied.*|`decoder.weight` and `enter"),
        (lambda: nn.Linear(2, 2), None, "has no repeated blocks"),
    ],
)
def test_layers_that_cannot_be_meant(module, order, message):
    with pytest.raises(MisconfigurationError, match=message):
        find_layers(module(), order)


def test_tied_weights_in_one_layer():
    layers = find_layers(Tied(), [["head", "decoder", "enter"], "blocks.1", "blocks.0"])
    assert len(set(ids_by_layer(Tied(), layers).values())) == 3


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": Seconds(3)}, r"`schedule` must be `Epochs\(n\)` or `Steps\(n\)`, got Seconds"),
        ({"schedule": 3}, "`schedule` must be"),
        ({"factor": 0.5}, r"`factor` must be .*1 or more, got 0\.5"),
        ({"factor": float("nan")}, "`factor` must be"),
        ({"start": 0}, "`start` must be .*1 or more, got 0"),
        ({"start": True}, "`start` must be"),
        ({"order": "head"}, r"`order` must be a list .*got 'head'"),
        ({"order": []}, "`order` must be a list"),
        ({"order": [["head"], []]}, "`order` must be a list"),
        ({"order": ["head", 3]}, "`order` must be a list"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(MisconfigurationError, match=message):
        LayerwiseUnfreezing(**options)


class Two(Net):
    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.head, self.blocks)]


class ByHand(Net):
    automatic_optimization = False


class HeadAlone(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (ByHand, [LayerwiseUnfreezing(order=ORDER)], "under manual optimisation LayerwiseUnfreezing"),
        (HeadAlone, [LayerwiseUnfreezing(order=ORDER)], "the layer `blocks.1` has no parameter group of its own"),
        (Net, [LayerwiseUnfreezing(order=ORDER, start=4)], "`start=4` leaves nothing to unfreeze: Net has 4 layers"),
        (Net, [LayerwiseUnfreezing(), Lightnings()], "LayerwiseUnfreezing and Lightning's Lightnings both freeze"),
        (Net, [LayerwiseUnfreezing(), LayerwiseUnfreezing()], "both freeze layers|more than one|same state"),
    ],
)
def test_refused_before_the_first_step(trainer, module, callbacks, message):
    net = module()
    with pytest.raises((MisconfigurationError, RuntimeError), match=message):
        trainer(callbacks, max_epochs=1).fit(net)
    assert "configure_optimizers" not in vars(net)


def test_several_optimizers_are_refused(trainer):
    class TwoByHand(Two):
        automatic_optimization = False

    with pytest.raises(MisconfigurationError, match="under manual optimisation"):
        trainer([LayerwiseUnfreezing(order=ORDER)], max_epochs=1).fit(TwoByHand())


class Trained(L.Callback):
    """What requires a gradient, hook by hook; what has one after the backward pass."""

    def __init__(self):
        self.seen = {}

    def note(self, hook, module):
        self.seen.setdefault(hook, []).append(sum(p.requires_grad for p in module.parameters()))

    def on_train_batch_start(self, trainer, pl_module, batch, index):
        self.note("start", pl_module)

    def on_before_backward(self, trainer, pl_module, loss):
        self.note("backward", pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.note("step", pl_module)
        self.seen.setdefault("gradients", []).append(sum(p.grad is not None for p in pl_module.parameters()))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.note("end", pl_module)


def test_gradients_of_frozen_layers_are_spared(trainer):
    """Within a training step and its backward pass only."""
    trained = Trained()
    trainer([trained, LayerwiseUnfreezing(Steps(1), order=ORDER)], max_epochs=1).fit(Net())
    assert trained.seen["backward"] == trained.seen["gradients"] == [2, 4, 6]
    assert trained.seen["start"] == trained.seen["step"] == trained.seen["end"] == [8, 8, 8]


class Skips(Net):
    def training_step(self, batch, index):
        return None if index else super().training_step(batch, index)


@pytest.mark.filterwarnings("ignore:.*returned .None.")
def test_a_training_step_without_a_loss(trainer):
    trained = Trained()
    trainer([trained, LayerwiseUnfreezing(order=ORDER)], max_epochs=1).fit(module := Skips())
    assert trained.seen["start"] == [8, 8, 8]
    assert all(parameter.requires_grad for parameter in module.parameters())


class Fails(Net):
    def training_step(self, batch, index):
        super().training_step(batch, index)
        raise KeyError("crash")


def test_a_training_step_that_fails(trainer):
    module = Fails()
    with pytest.raises(KeyError):
        trainer([LayerwiseUnfreezing(order=ORDER)], max_epochs=1).fit(module)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not {"training_step", "configure_optimizers"} & set(vars(module))


def test_the_module_is_left_as_it_was(trainer):
    module = Net()
    trainer([LayerwiseUnfreezing()], max_epochs=1).fit(module)
    assert not {"training_step", "configure_optimizers"} & set(vars(module))
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_norm_asked_for_before_is_refused(trainer):
    class Early(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            from lightning_tricks.engines import engine_of

            engine_of(trainer).gradient_norm(optimizer)

    with pytest.raises(MisconfigurationError, match="asked for the norm of gradients before another left a part"):
        trainer([Early(), LayerwiseUnfreezing()], max_epochs=1).fit(Net())
