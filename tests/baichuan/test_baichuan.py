"""The native Baichuan against its definitions: Llama with split weights, sentencepiece, the hub's checkpoint shape."""

import json
import shutil

import pytest
import sentencepiece
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from rlhf.baichuan import (
    BaichuanConfig,
    BaichuanForCausalLM,
    BaichuanForSequenceClassification,
    BaichuanModel,
    BaichuanTokenizer,
)

VOCAB = 97
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES["vocab_size"] = VOCAB


def random_model(model_class=BaichuanForCausalLM, seed=0, **overrides):
    torch.manual_seed(seed)
    config = BaichuanConfig(**{**SIZES, "initializer_range": 0.2, **overrides})
    return model_class(config).eval()


def llama_twin(model, attention="sdpa"):
    """A stock Llama with the same weights, W_pack cut into three by rows."""
    config = LlamaConfig(**{**SIZES, "max_position_embeddings": 4096, "attn_implementation": attention})
    weights = {}
    for name, weight in model.state_dict().items():
        if "W_pack" in name:
            for letter, part in zip("qkv", weight.chunk(3), strict=True):
                weights[name.replace("W_pack", f"{letter}_proj")] = part
        else:
            weights[name] = weight
    twin = LlamaForCausalLM(config).eval()
    twin.load_state_dict(weights)
    return twin


def padded_batch(side):
    """Three rows of 9, 6 and 1 real tokens, padded on `side`: (input_ids, attention_mask), both [3, 9]."""
    torch.manual_seed(1)
    ids, mask = torch.randint(3, VOCAB, (3, 9)), torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate((9, 6, 1)):
        mask[row, slice(9 - length, 9) if side == "left" else slice(0, length)] = 1
    return ids * mask, mask


# ---- the model is Llama ----


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_a_llama_with_the_same_weights(attention, side):
    model = random_model(attn_implementation=attention)
    ids, mask = padded_batch(side)
    ours = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    llamas = llama_twin(model, attention)(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(ours, llamas, rtol=0, atol=1e-5)
    assert ours.std() > 0.1


def test_eager_attention_weights_can_be_asked_for():
    ids, mask = padded_batch("right")
    output = random_model(attn_implementation="eager")(
        input_ids=ids, attention_mask=mask, output_attentions=True, output_hidden_states=True
    )
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, 9, 9)] * 2
    assert len(output.hidden_states) == 3


@pytest.mark.parametrize("cache", [None, "static"])
def test_cached_generation_equals_llamas_and_the_uncached_one(cache):
    model = random_model()
    ids, mask = padded_batch("left")
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    settings["eos_token_id"] = None
    cached = model.generate(ids, cache_implementation=cache, **settings)
    assert cached.tolist() == model.generate(ids, use_cache=False, **settings).tolist()
    assert cached.tolist() == llama_twin(model).generate(ids, **settings).tolist()


def test_padding_side_does_not_change_the_last_logits():
    model = random_model()
    (left, left_mask), (right, right_mask) = padded_batch("left"), padded_batch("right")
    for row, length in enumerate((9, 6, 1)):
        right[row, :length] = left[row, 9 - length :]
    last = model(input_ids=left, attention_mask=left_mask).logits[:, -1]
    rights = model(input_ids=right, attention_mask=right_mask).logits[torch.arange(3), right_mask.sum(1) - 1]
    torch.testing.assert_close(last, rights, rtol=0, atol=1e-4)


def test_gradient_checkpointing_changes_neither_loss_nor_gradients():
    ids, mask = padded_batch("right")

    def gradients(checkpointing):
        model = random_model().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        return loss, {name: weight.grad for name, weight in model.named_parameters()}

    loss, plain = gradients(False)
    checkpointed_loss, checkpointed = gradients(True)
    torch.testing.assert_close(loss, checkpointed_loss)
    torch.testing.assert_close(plain, checkpointed)
    assert plain["model.layers.0.self_attn.W_pack.weight"].abs().sum() > 0


def test_the_7b_model_has_the_hubs_parameters():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(BaichuanConfig())
    layer = {
        "self_attn.W_pack": (12288, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (11008, 4096),
        "mlp.up_proj": (11008, 4096),
        "mlp.down_proj": (4096, 11008),
        "input_layernorm": (4096,),
        "post_attention_layernorm": (4096,),
    }
    hub = {f"model.layers.{i}.{name}.weight": shape for i in range(32) for name, shape in layer.items()}
    hub |= {"model.embed_tokens.weight": (64000, 4096), "model.norm.weight": (4096,), "lm_head.weight": (64000, 4096)}
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == hub
    assert sum(weight.numel() for weight in model.parameters()) == 7_000_559_616


def test_baichuan_13b_is_refused_with_the_reason(tmp_path):
    config = {"model_type": "baichuan", "hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"Baichuan-13B.*ALiBi"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Baichuan-13B.*ALiBi"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# ---- Baichuan2: rows of the head have unit length ----


def test_baichuan2_is_known_by_its_vocabulary():
    assert BaichuanConfig(vocab_size=125696).norm_head
    assert not BaichuanConfig(vocab_size=64000).norm_head


def test_norm_head_divides_every_logit_by_its_rows_length(tmp_path):
    model = random_model(norm_head=True)
    ids, _ = padded_batch("right")
    states = model.model(ids).last_hidden_state
    definition = states @ (model.lm_head.weight / model.lm_head.weight.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(model(ids).logits, definition)

    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded.lm_head.weight.requires_grad and not info["missing_keys"]
    torch.testing.assert_close(loaded.lm_head.weight.norm(dim=1), torch.ones(VOCAB))
    torch.testing.assert_close(loaded(ids).logits, definition)


# ---- loading what the hub has ----


@pytest.fixture
def hub_shaped(tiny_base, tmp_path):
    """The tiny model as the hub lays baichuan-7B out: a .bin checkpoint with rotary tables, auto_map, .py files."""
    config = json.loads((tmp_path.joinpath(tiny_base) / "config.json").read_text())
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size rms_norm_eps hidden_act"
    config = {key: config[key] for key in keys.split()} | {
        "model_type": "baichuan",
        "architectures": ["BaiChuanForCausalLM"],
        "torch_dtype": "float16",
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaiChuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaiChuanForCausalLM",
        },
    }
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    tokenizer = {
        "add_bos_token": False,
        "add_eos_token": False,
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaiChuanTokenizer", None]},
        "bos_token": token | {"content": "<s>"},
        "eos_token": token | {"content": "</s>"},
        "unk_token": token | {"content": "<unk>"},
        "clean_up_tokenization_spaces": False,
        "sp_model_kwargs": {},
        "tokenizer_class": "BaiChuanTokenizer",
    }
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text(json.dumps(config))
    (hub / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    shutil.copy(f"{tiny_base}/tokenizer.model", hub)
    for name in ("configuration", "modeling", "tokenization"):
        (hub / f"{name}_baichuan.py").write_text("raise ImportError('remote code was executed')\n")
    weights = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    for layer in range(config["num_hidden_layers"]):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.full((4,), float("nan"))
    torch.save(weights, hub / "pytorch_model.bin")
    return hub


@pytest.mark.parametrize("trust", [None, True])
def test_a_directory_in_the_hubs_shape_loads_with_our_code(hub_shaped, tiny_base, trust):
    tokenizer = AutoTokenizer.from_pretrained(hub_shaped, trust_remote_code=trust)
    model, info = AutoModelForCausalLM.from_pretrained(
        hub_shaped, trust_remote_code=trust, dtype=torch.float32, output_loading_info=True
    )
    scorer = AutoModelForSequenceClassification.from_pretrained(
        hub_shaped, trust_remote_code=trust, num_labels=1, dtype=torch.float32
    )
    assert isinstance(AutoConfig.from_pretrained(hub_shaped, trust_remote_code=trust), BaichuanConfig)
    assert isinstance(AutoModel.from_pretrained(hub_shaped, trust_remote_code=trust), BaichuanModel)
    assert isinstance(tokenizer, BaichuanTokenizer) and isinstance(model, BaichuanForCausalLM)
    assert isinstance(scorer, BaichuanForSequenceClassification)
    assert not info["missing_keys"] and not info["unexpected_keys"]

    text = "问：你喜欢苹果？\n\n答：我喜欢42个橘子。</s>"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.tolist() == AutoTokenizer.from_pretrained(tiny_base)(text, return_tensors="pt").input_ids.tolist()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    torch.testing.assert_close(model(ids).logits, AutoModelForCausalLM.from_pretrained(tiny_base)(ids).logits)


def test_auto_map_is_dropped_on_save(hub_shaped, tmp_path):
    AutoTokenizer.from_pretrained(hub_shaped).save_pretrained(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(hub_shaped).save_pretrained(tmp_path / "saved")
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "saved" / name).read_text())
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "saved"), BaichuanTokenizer)


# ---- the tokenizer is sentencepiece ----


@pytest.fixture(scope="module")
def real_tokenizer(shared_data):
    return BaichuanTokenizer(vocab_file=str(shared_data / "baichuan_64k.model"))


def test_ids_and_decoded_text_equal_sentencepieces_on_real_text(real_tokenizer, sample_lines, shared_data):
    raw = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / "baichuan_64k.model"))
    expected = raw.encode(sample_lines)
    assert real_tokenizer(sample_lines).input_ids == expected
    assert real_tokenizer.batch_decode(expected) == raw.decode(expected)


def test_a_published_example_of_ids(real_tokenizer):
    assert real_tokenizer("What is your name?").input_ids == [2276, 715, 879, 1868, 81]


def test_saved_and_reloaded_it_is_the_same(real_tokenizer, sample_lines, tmp_path):
    real_tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(reloaded) is BaichuanTokenizer
    assert reloaded.split_special_tokens and reloaded.pad_token_id == 0
    some = [*sample_lines[::50], "a </s> b"]
    assert reloaded(some).input_ids == real_tokenizer(some).input_ids


@pytest.mark.parametrize("control", ["<unk>", "<s>", "</s>"])
def test_control_tokens_in_text_stay_text(real_tokenizer, control):
    for text in (control, f"前{control}后", f"\n{control}\n"):
        ids = real_tokenizer(text).input_ids
        assert not {0, 1, 2} & set(ids)
        assert real_tokenizer.decode(ids) == text


def test_control_ids_are_shown_or_skipped_when_decoding(real_tokenizer):
    ids = [0, 0, *real_tokenizer("你好 world龘").input_ids, 2]
    assert real_tokenizer.decode(ids) == "<unk><unk>你好 world龘</s>"
    assert real_tokenizer.decode(ids, skip_special_tokens=True) == "你好 world龘"


# ---- sequence classification pools by mask ----


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_taken_at_the_last_real_token(side):
    model = random_model(BaichuanForSequenceClassification, num_labels=1)
    ids, mask = padded_batch(side)
    states = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, score in enumerate(model(input_ids=ids, attention_mask=mask).logits):
        last = max(column for column in range(9) if mask[row, column])
        torch.testing.assert_close(score, model.score(states[row, last]))


def test_the_score_sees_a_last_token_equal_to_the_pad_id():
    # With pad == eos the generic class would pool before the EOS that ends every answer.
    model = random_model(BaichuanForSequenceClassification, num_labels=1, pad_token_id=2, eos_token_id=2)
    answer = torch.tensor([[5, 6, 7, 2]])
    padded = torch.tensor([[5, 6, 7, 2, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    score = model(input_ids=answer, attention_mask=torch.ones_like(answer)).logits
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask).logits, score)
    torch.testing.assert_close(model(input_ids=answer).logits, score)
    assert (model(input_ids=answer[:, :3]).logits - score).abs() > 1e-3


def test_scores_from_embeddings_are_those_from_ids():
    model = random_model(BaichuanForSequenceClassification, num_labels=1)
    ids, mask = padded_batch("right")
    embeddings = model.get_input_embeddings()(ids)
    (from_ids,) = model(input_ids=ids, attention_mask=mask.bool(), use_cache=False, return_dict=False)
    torch.testing.assert_close(model(inputs_embeds=embeddings, attention_mask=mask.bool()).logits, from_ids)


def test_padding_with_nan_states_does_not_reach_the_score():
    model = random_model(BaichuanForSequenceClassification, num_labels=1)
    ids, mask = padded_batch("right")
    clean = model(input_ids=ids, attention_mask=mask).logits

    def spoil_padding(module, inputs, output):
        return output.masked_fill(mask[..., None] == 0, float("nan"))

    handle = model.model.norm.register_forward_hook(spoil_padding)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, clean)
    handle.remove()
