"""Baichuan's tokenizer: the checkpoint's SentencePiece model itself, so its ids are sentencepiece's own."""

from typing import ClassVar

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend


class BaichuanTokenizer(SentencePieceBackend):
    """SentencePiece with control tokens kept out of the text.

    Nothing is added before or after the text (the hub's default). Pad is <unk>, id 0, which with byte fallback no text
    produces; and `</s>` written in a text is five characters, never the control token.
    """

    model_input_names: ClassVar[list] = ["input_ids", "attention_mask"]

    def __init__(self, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=None, **kwargs):
        # As in the config: the file it points to is never run and never saved.
        kwargs.pop("auto_map", None)
        # Without this, "</s>" written in a text would become the control token.
        kwargs.setdefault("split_special_tokens", True)
        # In decoding it would take spaces before punctuation away, which the text may really hold.
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(
            unk_token=unk_token, bos_token=bos_token, eos_token=eos_token, pad_token=pad_token or unk_token, **kwargs
        )

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Sentencepiece's own decoding of every run of pieces, with control tokens in between as they are written.

        The base class would leave byte pieces such as <0xE4> in the text.
        """
        text = ""
        run = []
        for token in tokens:
            # sentencepiece would decode a control piece to nothing, so it is put in as it is written.
            if token in self._added_tokens_encoder:
                text += self.sp_model.decode_pieces(run) + token
                run = []
            else:
                run.append(token)
        # The pieces after the last control token.
        return text + self.sp_model.decode_pieces(run)


class BaiChuanTokenizer(BaichuanTokenizer):
    """The same under the name in baichuan-7B's tokenizer_config.json (Baichuan2 spells it with a small c)."""
