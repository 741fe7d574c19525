"""The `adapters` command: list, merge, export, import."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_tricks.cli.adapters import adapters
from lightning_tricks.cli.command import main
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.mixins import PromptTuning
from lightning_tricks.storage import WeightsFile, write_weights
from tests.mixins.models import Encoder, Holder, moved
from tests.mixins.test_adapter_files import CASES
from tests.mixins.test_lora_layers import gpt2
from tests.mixins.test_prompts import decoder

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler")


def written(module, path):
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    write_weights(path, {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}, state.items())


@pytest.mark.parametrize("case", CASES)
def test_merged_files_are_the_merged_module(case, tmp_path, capsys):
    build, inputs, policy = CASES[case]
    base, x = build(), inputs()
    written(base, tmp_path / "base.safetensors")
    model = moved(Holder(copy.deepcopy(base), policy)).eval()
    model.save_adapter(tmp_path / "adapter")
    assert adapters(["merge", *(str(tmp_path / n) for n in ("adapter", "base.safetensors", "out.safetensors"))]) == 0
    file = WeightsFile(tmp_path / "out.safetensors")
    base.load_state_dict({name: file.tensor(name) for name in file.names}, strict=True)
    torch.testing.assert_close(base(x), model.net(x), rtol=1e-5, atol=1e-5)
    assert "the adapter is in" in capsys.readouterr().err


@pytest.mark.parametrize("targets", [("c_attn:q,v", "c_fc"), ("c_proj",)])
def test_gpt2s_transposed_weights_are_merged(targets, tmp_path):
    from lightning_tricks.mixins import DoRA, LoRA

    base, x = gpt2(), torch.randint(0, 50, (2, 5))
    written(base, tmp_path / "base.safetensors")
    policy = (DoRA if targets == ("c_proj",) else LoRA)(rank=2, alpha=3, targets=targets)
    model = moved(Holder(copy.deepcopy(base), policy)).eval()
    model.save_adapter(tmp_path / "adapter")
    adapters(["merge", *(str(tmp_path / n) for n in ("adapter", "base.safetensors", "out.safetensors"))])
    file = WeightsFile(tmp_path / "out.safetensors")
    base.load_state_dict({name: file.tensor(name) for name in file.names}, strict=True)
    torch.testing.assert_close(base(input_ids=x)[0], model.net(input_ids=x)[0], rtol=1e-5, atol=1e-5)


def test_another_base_is_refused_by_the_tensors_name(tmp_path):
    Holder(Encoder(), CASES["LoRA"][2]).save_adapter(tmp_path / "adapter")
    written(Encoder(seed=1), tmp_path / "base.safetensors")
    paths = [str(tmp_path / n) for n in ("adapter", "base.safetensors", "out.safetensors")]
    with pytest.raises(CheckpointError, match=r"`layer\.0\.query\.weight` in .*base\.safetensors is not the tensor"):
        adapters(["merge", *paths])
    written(torch.nn.Linear(2, 2), tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError, match=r"has no `layer\.0\.query\.weight`"):
        adapters(["merge", *paths])
    with pytest.raises(MisconfigurationError, match=r"must end in \.safetensors"):
        adapters(["merge", *paths[:2], str(tmp_path / "out.bin")])
    assert not (tmp_path / "out.safetensors").exists()


def test_what_cannot_be_merged_is_refused(tmp_path):
    Holder(decoder(), PromptTuning(tokens=2)).save_adapter(tmp_path / "prompt")
    Holder(Encoder(), CASES["LoRA"][2], trainable=("pooler",)).save_adapter(tmp_path / "pooler")
    written(Encoder(), tmp_path / "base.safetensors")
    for folder, message in (("prompt", "PromptTuning cannot be merged"), ("pooler", "holds `pooler.weight` besides")):
        with pytest.raises(MisconfigurationError, match=message):
            adapters(["merge", *(str(tmp_path / n) for n in (folder, "base.safetensors", "out.safetensors"))])


def test_list_says_what_folders_hold(tmp_path, capsys):
    for name in ("LoRA", "DoRA", "IA3"):
        Holder(CASES[name][0](), CASES[name][2]).save_adapter(tmp_path / name)
    assert main(["adapters", "list", *(str(tmp_path / name) for name in ("LoRA", "DoRA", "IA3"))]) == 0
    lora, dora, ia3 = capsys.readouterr().out.splitlines()
    assert "LoRA: LORA r=2 alpha=3, 48 numbers, 0.00 MB, knows its base by 5 tensors" in lora
    assert "DORA r=2 alpha=3, 60 numbers" in dora
    assert "IA3, 12 numbers" in ia3
    assert main(["adapters", "list", str(tmp_path / "absent")]) == 2
    assert "there is no adapter folder" in capsys.readouterr().err


@pytest.mark.slow
def test_checkpoints_of_text_classifiers_go_out_and_in(tmp_path, capsys):
    from lightning_tricks.cli.prediction import load_classifier
    from lightning_tricks.recipes import TextClassifier

    models = []
    for number in range(2):
        model = moved(TextClassifier(["bad", "good"], class_weighting="none", rank=2))
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.strategy.connect(model)
        trainer.save_checkpoint(tmp_path / f"{number}.ckpt")
        models.append(model)
    assert main(["adapters", "export", str(tmp_path / "0.ckpt"), str(tmp_path / "folder")]) == 0
    assert main(["adapters", "list", str(tmp_path / "folder")]) == 0
    assert "LORA r=2" in capsys.readouterr().out
    out = tmp_path / "both.ckpt"
    assert main(["adapters", "import", str(tmp_path / "folder"), str(tmp_path / "1.ckpt"), str(out)]) == 0
    both = load_classifier(str(out)).state_dict()
    for name, value in both.items():
        source = models[0 if "lora_" in name else 1].state_dict()
        assert torch.equal(value, source[name]), name


@pytest.mark.slow
def test_an_adapter_goes_out_and_in_by_its_name(tmp_path, capsys):
    from tests.cli.two_adapters import TwoAdapters

    for number in range(2):
        model = moved(TwoAdapters(["bad", "good"], class_weighting="none", rank=2))
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.strategy.connect(model)
        trainer.save_checkpoint(tmp_path / f"{number}.ckpt")
        content = torch.load(tmp_path / f"{number}.ckpt", weights_only=True)
        content["hyper_parameters"]["_class_path"] = "tests.cli.two_adapters.TwoAdapters"  # as LightningCLI notes it
        torch.save(content, tmp_path / f"{number}.ckpt")
    folder, first, second, out = (str(tmp_path / name) for name in ("folder", "0.ckpt", "1.ckpt", "out.ckpt"))
    assert main(["adapters", "export", first, folder, "--name", "french"]) == 0
    assert main(["adapters", "list", folder]) == 0
    assert "LORA r=3" in capsys.readouterr().out
    assert main(["adapters", "import", folder, second, out, "--name", "french"]) == 0
    weights = [torch.load(path, weights_only=True)["state_dict"] for path in (first, second, out)]
    for name, value in weights[2].items():
        assert torch.equal(value, weights[0 if name.endswith("_french") else 1][name]), name
    assert main(["adapters", "import", folder, second, out, "--name", "german"]) == 2
    assert "has no adapter 'german': there are default, french" in capsys.readouterr().err
    assert main(["adapters", "import", folder, second, out]) == 2
    assert "lacks the tensor for `encoder.layer.0.attention.self.value.lora_A`" in capsys.readouterr().err
