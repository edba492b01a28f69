"""Tiny models with random weights on disk in the hub's own format: config, weights, tokenizer, preprocessor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertTokenizerFast,
    CLIPTokenizerFast,
    DetrConfig,
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam3Config,
    Sam3ImageProcessor,
    Sam3Model,
    SwinConfig,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

# BERT's own places: transformers' Grounding DINO knows its delimiters by number.
BERT_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-'"


def write_bert_tokenizer(folder: Path, words: tuple[str, ...] = ()) -> None:
    """A word-piece tokenizer that spells every word by letters, but those of `words`."""
    placed = {i: token for token, i in BERT_IDS.items()}
    free = iter([*words, *LETTERS, *(f"##{letter}" for letter in LETTERS)])
    lines = [placed.get(i) or (next(free, f"[unused{i}]") if i > 110 else f"[unused{i}]") for i in range(1100)]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(lines) + "\n")
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)


def detector_settings(**changes: Any) -> dict[str, Any]:
    """What both Grounding DINO configs take."""
    backbone = SwinConfig(
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        drop_path_rate=0.0,
        out_indices=[2, 3, 4],
    )
    text = BertConfig(vocab_size=1100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return {
        "backbone_config": backbone,
        "text_config": text,
        "d_model": 32,
        "num_queries": 20,
        "num_feature_levels": 3,  # a fourth is 1x1 at 64 px, of which a group norm of single channels is undefined
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_text_len": 64,
        **changes,
    }


def write_detector(folder: Path, kind: str = "mm", words: tuple[str, ...] = (), **changes: Any) -> Path:
    """A (MM-)Grounding DINO of some 100 thousand weights that takes images of 64 px."""
    torch.manual_seed(0)
    model: Any
    if kind == "mm":
        model = MMGroundingDinoForObjectDetection(MMGroundingDinoConfig(**detector_settings(**changes)))
    else:
        model = GroundingDinoForObjectDetection(GroundingDinoConfig(**detector_settings(**changes)))
    model.save_pretrained(folder)
    write_bert_tokenizer(folder, words)
    GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


def sam2_config(image_px: int = 64) -> Sam2Config:
    sizes = [[image_px // 4, image_px // 4], [image_px // 8, image_px // 8], [image_px // 16, image_px // 16]]
    return Sam2Config(
        vision_config={
            "backbone_config": {
                "hidden_size": 8,
                "num_attention_heads": 1,
                "image_size": [image_px, image_px],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 2],
                "window_size_per_stage": [4, 4, 4, 2],
                "global_attention_blocks": [3],
                "window_positional_embedding_background_size": [4, 4],
                "model_type": "sam2_hiera_det_model",
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": sizes,
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": image_px, "patch_size": 16},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 32,
            "num_hidden_layers": 2,
        },
    )


def write_sam2(folder: Path, image_px: int = 64) -> Path:
    """A SAM2 for images of `image_px`."""
    torch.manual_seed(0)
    Sam2Model(sam2_config(image_px)).save_pretrained(folder)
    size = {"height": image_px, "width": image_px}
    mask = {"height": image_px // 4, "width": image_px // 4}
    Sam2ImageProcessor(size=size, mask_size=mask).save_pretrained(folder)
    return folder


def write_clip_tokenizer(folder: Path) -> None:
    """A byte-pair tokenizer without merges: every word is spelt."""
    alphabet = list(bytes_to_unicode().values())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizerFast(vocab=vocabulary, merges=[]).save_pretrained(folder)


def write_sam3(folder: Path, image_px: int = 56) -> Path:
    """A SAM3 for images of `image_px`, with 10 queries."""
    torch.manual_seed(0)
    grid = image_px // 14
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    config = Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                **small,
                "num_hidden_layers": 2,
                "image_size": image_px,
                "window_size": 2,
                "global_attn_indexes": [1],
                "pretrain_image_size": image_px,
            },
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[grid * 4, grid * 4], [grid * 2, grid * 2], [grid, grid]],
        },
        text_config={
            "model_type": "clip_text_model",
            **small,
            "vocab_size": 514,
            "num_hidden_layers": 1,
            "projection_dim": 32,
            "max_position_embeddings": 32,
            "bos_token_id": 512,
            "eos_token_id": 513,
            "pad_token_id": 513,
        },
        geometry_encoder_config={**small, "num_layers": 1},
        detr_encoder_config={**small, "num_layers": 1},
        detr_decoder_config={**small, "num_layers": 2, "num_queries": 10},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2, "num_upsampling_stages": 3},
    )
    Sam3Model(config).save_pretrained(folder)
    write_clip_tokenizer(folder)
    size, mask = {"height": image_px, "width": image_px}, {"height": grid * 4, "width": grid * 4}
    Sam3ImageProcessor(size=size, mask_size=mask).save_pretrained(folder)
    return folder


def write_mask_transformer(
    folder: Path, kind: str = "mask2former", labels: tuple[str, ...] = ("person", "dog")
) -> Path:
    """A Mask2Former, MaskFormer, EoMT or EoMT-DINOv3 with the labels given."""
    torch.manual_seed(0)
    id2label = dict(enumerate(labels))
    names = {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, out_features=stages)
    model: Any
    if kind == "mask2former":
        small = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32}
        small |= {"encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2, "dim_feedforward": 32}
        config = Mask2FormerConfig(backbone_config=backbone, num_queries=10, **small, **names)
        model = Mask2FormerForUniversalSegmentation(config)
    elif kind == "maskformer":
        small = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 32}
        decoder = DetrConfig(**small, num_queries=10, encoder_attention_heads=2, decoder_attention_heads=2)
        config = MaskFormerConfig(
            backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, **names
        )
        model = MaskFormerForInstanceSegmentation(config)
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
        sizes |= {"image_size": 64, "patch_size": 16, "num_blocks": 2, "num_queries": 10, "num_upscale_blocks": 2}
        if kind == "eomt":
            model = EomtForUniversalSegmentation(EomtConfig(**sizes, **names))
        else:
            model = EomtDinov3ForUniversalSegmentation(EomtDinov3Config(**sizes, **names))
    model.save_pretrained(folder)
    Mask2FormerImageProcessor().save_pretrained(folder)
    return folder


_EOMT = {"head": "eomt", "num_queries": 10, "num_layers": 2, "proposals": False}
PUBLISHED_SETTINGS: dict[str, dict[str, Any]] = {
    "mask2former": {
        "encoder": {"name": "swin-t"},
        "decoder": "msdeform",
        "decoder_layers": 1,
        "decoder_feedforward_dim": 32,
        "hidden_dim": 32,
        "num_queries": 10,
        "num_layers": 2,
        "num_heads": 2,
        "feedforward_dim": 32,
        "proposals": False,
    },
    "eomt": {"encoder": {"name": "dinov2-s-reg16"}, **_EOMT},
    "eomt_dinov3": {"encoder": {"name": "dinov3-s"}, **_EOMT},
}
"""Kind of `write_mask_transformer` -> the fields of `ModelConfig` that a student with its weights has."""
