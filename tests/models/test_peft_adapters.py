"""Adapters made by plain peft: on the shared base each computes what peft computes alone, or it is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import merge_lora
from rlhf.artefacts.adapters import read_adapter
from rlhf.artefacts.foreign import refuse_unshareable
from rlhf.compare.answers import AnswerSettings, Versions
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.models.loading import load_base
from rlhf.models.lora import add_lora, continue_adapter
from rlhf.rl.roles import load_roles

ATTENTION = ["q_proj", "v_proj"]
# As unsloth writes it for any of its models.
PARTS = "self_attn|attention|attn|mlp|feed_forward|ffn|dense"
NAMES = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
UNSLOTH = (
    rf"(?:.*?(?:language|text).*?(?:{PARTS}).*?(?:{NAMES}).*?)"
    rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{PARTS})\.(?:(?:{NAMES})))"
)
# What a shared base carries exactly: settings of LoraConfig beside rank 4, alpha 8 and the attention projections.
CARRIED = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 3}},
    "dora": {"use_dora": True},
    "layers_to_transform": {"layers_to_transform": [1]},
    "expression": {"target_modules": r".*layers\.0\.mlp\.(up|down)_proj"},
    "unsloth": {"target_modules": UNSLOTH},
    "all_linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "output_layer": {"target_modules": ["q_proj", "lm_head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
}
# What would change the base for the other roles, and the word that names it.
REFUSED = {
    "saved_norm": ({"modules_to_save": ["norm"]}, "modules_to_save norm"),
    "saved_head": ({"modules_to_save": ["lm_head"]}, "modules_to_save lm_head"),
    "bias": ({"bias": "lora_only"}, "uses bias"),
    "lora_bias": ({"lora_bias": True}, "uses lora_bias"),
    "pissa": ({"init_lora_weights": "pissa"}, "initialised with pissa"),
    "olora": ({"init_lora_weights": "olora"}, "initialised with olora"),
    "tokens": ({"trainable_token_indices": [3, 4]}, "uses trainable_token_indices"),
}
IDS = torch.arange(5, 25).view(2, 10)


def plain_adapter(base: str, folder: Path, settings: dict) -> str:
    """An adapter as plain peft writes it, every trained tensor random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | settings
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), LoraConfig(**settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(str(folder))
    return str(folder)


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def alone(base: str, folder: str) -> torch.Tensor:
    """Logits of base and adapter as plain peft loads them."""
    return logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), folder))


@pytest.fixture(scope="module")
def bases(tiny_llama, tmp_path_factory):
    """A stock Llama, and the same with tied embeddings."""
    tied = tmp_path_factory.mktemp("tied")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tied)
    for file in Path(tiny_llama).glob("tokenizer*"):
        shutil.copy(file, tied)
    return {"untied": tiny_llama, "tied": str(tied)}


@pytest.fixture(scope="module")
def reward(tiny_llama, tmp_path_factory):
    from adapters import random_adapter

    return random_adapter(tiny_llama, tmp_path_factory.mktemp("reward"), "reward", 1)


# ---- exact ----
@pytest.mark.parametrize("kind", CARRIED)
def test_every_role_computes_what_peft_computes(bases, reward, tmp_path, kind):
    base = bases["untied"]
    folder = plain_adapter(base, tmp_path / kind, CARRIED[kind])
    expected = alone(base, folder)
    roles = load_roles(base, folder, reward, dtype=torch.float32, device="cpu")
    roles.train(False)
    for role in ("policy", "reference"):
        with roles.use(role) as model:
            torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CARRIED)
def test_compare_answers_with_what_peft_computes_and_leaves_the_base_alone(bases, tmp_path, kind):
    base = bases["untied"]
    folder = plain_adapter(base, tmp_path / kind, CARRIED[kind])
    versions = Versions(base, text_format(load_tokenizer(base)), AnswerSettings(), torch.float32, "cpu")
    versions.add("x", folder)
    with versions.use("x") as model:
        torch.testing.assert_close(logits_of(model), alone(base, folder), rtol=0, atol=1e-5)
    with versions.use("base") as model:
        plain = logits_of(AutoModelForCausalLM.from_pretrained(base, dtype="float32"))
        torch.testing.assert_close(logits_of(model), plain, rtol=0, atol=0)


@pytest.mark.parametrize("tie", ["untied", "tied"])
@pytest.mark.parametrize("kind", [*CARRIED, "saved_norm", "saved_head", "pissa"])
def test_a_merged_model_is_base_and_adapter(bases, tmp_path, kind, tie):
    if tie == "tied" and kind in ("embedding", "output_layer"):
        pytest.skip("peft itself warns of an adapter on one of two tied matrices; the merge unties them (saved_head)")
    settings = CARRIED[kind] if kind in CARRIED else REFUSED[kind][0]
    folder = plain_adapter(bases[tie], tmp_path / kind, settings)
    target = tmp_path / "merged"
    merge_lora.main(
        merge_lora.parse_args(
            ["--base_model_name", bases[tie], "--lora_path", folder, "--output_dir", str(target), "--dtype", "float32"]
        )
    )
    merged = AutoModelForCausalLM.from_pretrained(target, dtype="float32")
    torch.testing.assert_close(logits_of(merged), alone(bases[tie], folder), rtol=0, atol=1e-5)


# ---- refused by name ----
@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_change_the_shared_base_is_refused_by_name(bases, tmp_path, kind):
    settings, words = REFUSED[kind]
    folder = plain_adapter(bases["untied"], tmp_path / kind, settings)
    for put_on in (
        lambda: add_lora(load_base(bases["untied"], torch.float32), folder, "policy", trainable=False),
        lambda: continue_adapter(load_base(bases["untied"], torch.float32), folder),
    ):
        with pytest.raises(ValueError, match=words):
            put_on()


def test_another_method_than_lora_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3", "target_modules": ["q_proj"]}')
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="of type IA3, but this project trains and reads LoRA"):
        refuse_unshareable(*read_adapter(tmp_path), "adapter x")


def test_an_absurd_rank_is_refused_before_its_layers_are_built(bases, tmp_path):
    folder = Path(plain_adapter(bases["untied"], tmp_path / "a", {}))
    config = json.loads((folder / "adapter_config.json").read_text())
    for change in ({"r": 10**9}, {"rank_pattern": {"q_proj": 10**9}}):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="says rank 1000000000, but its largest tensor has rank 4"):
            add_lora(load_base(bases["untied"], torch.float32), folder, "policy", trainable=False)


def test_a_saved_copy_of_the_bases_own_embedding_is_no_module_of_its_own(bases, tmp_path):
    base = bases["untied"]
    folder = Path(plain_adapter(base, tmp_path / "a", {}))
    weights = load_file(folder / "adapter_model.safetensors")
    own = AutoModelForCausalLM.from_pretrained(base, dtype="float32").model.embed_tokens.weight.detach()
    name = "base_model.model.model.embed_tokens.weight"
    save_file(weights | {name: own.clone()}, folder / "adapter_model.safetensors")
    _, rest = add_lora(load_base(base, torch.float32), folder, "policy", trainable=False)
    assert rest == {}
    save_file(weights | {name: torch.cat([own, own[:5]])}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"holds a model\.embed_tokens\.weight of its own"):
        add_lora(load_base(base, torch.float32), folder, "policy", trainable=False)
    arguments = ["--base_model_name", base, "--lora_path", str(folder), "--output_dir", str(tmp_path / "merged")]
    with pytest.raises(ValueError, match="trained with a vocabulary of"):
        merge_lora.main(merge_lora.parse_args(arguments))


def test_a_kind_of_lora_that_is_no_change_of_weights_is_not_merged(bases, tmp_path):
    # It counts for tokens after its own words alone.
    folder = plain_adapter(bases["untied"], tmp_path / "a", {"alora_invocation_tokens": [5, 6]})
    words = ["--base_model_name", bases["untied"], "--lora_path", folder, "--output_dir", str(tmp_path / "merged")]
    with pytest.raises(ValueError, match=r"adapter .* cannot be used \(.*: it cannot be merged"):
        merge_lora.main(merge_lora.parse_args(words))
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ValueError, match="uses alora_invocation_tokens"):
        add_lora(load_base(bases["untied"], torch.float32), folder, "policy", trainable=False)


# ---- the shared cases ----
def test_the_shared_cases_are_exact_or_refused(shared_data, tmp_path):
    cases = shared_data.parent / "cases"
    expected = json.loads((cases / "expected.json").read_text())
    ids = torch.tensor(expected["ids"])
    refused = {"saved_norm": "modules_to_save", "pissa": "initialised with pissa", "bias_in_b": "uses lora_bias"}
    refused |= {"tied_saved_head": "modules_to_save", "grown_vocabulary": "modules_to_save"}
    for name, words in refused.items():
        base = cases / ("base_tied" if name.startswith("tied") else "base")
        with pytest.raises(ValueError, match=words):
            add_lora(load_base(str(base), torch.float32), cases / "adapters" / name, "policy", trainable=False)

    for name in ("plain", "saved_norm", "pissa", "tied_saved_head"):
        right = torch.tensor(expected["adapters"][name]["last_logits_first_5"])
        words = ["--base_model_name", str(cases / expected["adapters"][name]["base"]), "--dtype", "float32"]
        words += ["--lora_path", str(cases / "adapters" / name), "--output_dir", str(tmp_path / name)]
        merge_lora.main(merge_lora.parse_args(words))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="float32").eval()
        with torch.no_grad():
            torch.testing.assert_close(merged(input_ids=ids).logits[:, -1, :5], right, rtol=0, atol=1e-5)
    for name, words in (("grown_vocabulary", "vocabulary of 261"), ("bias_in_b", "trains biases")):
        command = ["--base_model_name", str(cases / "base"), "--lora_path", str(cases / "adapters" / name)]
        with pytest.raises(ValueError, match=words):
            merge_lora.main(merge_lora.parse_args([*command, "--output_dir", str(tmp_path / name)]))


def test_layers_of_peft_have_the_interface_that_is_relied_on():
    assert hasattr(BaseTunerLayer, "set_adapter")
