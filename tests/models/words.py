"""A WordPiece tokenizer of a few words, which needs no file."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##happy", "dog", "happy", "sad", "cat", "runs", "sleeps")


def word_tokenizer() -> PreTrainedTokenizerFast:
    pieces = {piece: number for number, piece in enumerate(PIECES)}
    word_piece = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    word_piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    word_piece.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=word_piece,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
