"""Make the demo backbone `digits-vlm` from nothing: `python scripts/pretrain_digits_vlm.py --out FOLDER`.

1. The vision tower learns to name the digit in each quadrant (mean of its four patch tokens, linear read-out).
2. Language first, as in any vision-language model: the decoder learns the questions that need no picture, with layers
   left out at random (LayerDrop), which large models are pretrained with as well.
3. Projector and decoder learn the questions about the picture with the tower frozen; every fourth step rehearses
   language. All questions about a picture share one sequence: every question sees the image tokens and itself, at the
   positions it would have alone.
4. The saved folder is loaded again and answers questions about test scans, one prompt at a time, with `generate`.

Only train scans are learned from; val scans give the progress figures; test scans are touched once, at the end.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, reduce
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from adaskip.demo import digits
from adaskip.demo.backbone import FOLDER

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "image_token": "<image>"}
VOCABULARY = {word: index for index, word in enumerate([*SPECIAL.values(), *digits.WORDS])}
PAD, EOS, IMAGE = (VOCABULARY[SPECIAL[name]] for name in ("pad_token", "eos_token", "image_token"))
IMAGE_TOKENS = 16
SEEN = ("digit",) * 3 + ("sum",) * 4 + ("count",) * 5 + ("max",) * 3
"""The questions about the picture that each training picture carries; the hard kinds come more often."""
READ = ("arithmetic",) * 6 + ("repeat",) * 5
"""The questions that need no picture, carried by each training picture of a language step."""
DROP = 0.4
"""Chance that a language step leaves out a decoder layer."""
REHEARSE = 4
"""Every so many steps one of language."""


def build_processor() -> LlavaProcessor:
    """Word-level tokenizer and 16x16 image processor, padding on the left."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token=SPECIAL["unk_token"]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {name: token for name, token in SPECIAL.items() if name != "image_token"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        **named,
        extra_special_tokens={"image_token": SPECIAL["image_token"]},
        padding_side="left",
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
    )
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model() -> LlavaForConditionalGeneration:
    """A randomly initialised LLaVA: CLIP tower (4 layers) and Llama decoder (12 layers), both 128 wide."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            image_seq_length=IMAGE_TOKENS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
    )


def augment(places: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scans `n 4 8 8` turned (12 degrees), zoomed and sheared (15 %), shifted (one pixel), dimmed, made noisy."""
    flat = torch.from_numpy(rearrange(places, "n p h w -> (n p) 1 h w").astype(np.float32))
    uniform = torch.from_numpy(rng.uniform(-1, 1, size=(7, len(flat))).astype(np.float32))
    angle, shear = uniform[0] * math.radians(12), uniform[1] * 0.15
    zoom_x, zoom_y = 1 + 0.15 * uniform[2], 1 + 0.15 * uniform[3]
    shift_x, shift_y = uniform[4] / 4, uniform[5] / 4
    rows = [zoom_x * angle.cos(), shear - angle.sin(), shift_x, angle.sin(), zoom_y * angle.cos(), shift_y]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(flat.shape), align_corners=False)
    moved = F.grid_sample(flat, grid, align_corners=False)
    noise = torch.from_numpy(rng.normal(0, 10, size=moved.shape).astype(np.float32))
    lit = (moved * (1 + 0.2 * uniform[6]).view(-1, 1, 1, 1) + noise).clamp(0, 255)
    return rearrange(lit, "(n p) 1 h w -> n p h w", p=4).numpy()


def batch(split: str, count: int, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """`pixel_values` `b 3 16 16` (augmented on the train split) and labels `b 4`."""
    places, labels = digits.draw(split, count, rng)
    if split == "train":
        places = augment(places, rng)
    return torch.from_numpy(digits.pixel_values(digits.compose(places))), labels


def optimise(
    parameters: list[nn.Parameter], steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR]:
    """AdamW at 1e-3 with a one-cycle schedule."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)


def train_tower(model: LlavaForConditionalGeneration, steps: int, rng: np.random.Generator) -> None:
    """Teach the vision tower which digit each quadrant shows; the read-out is thrown away."""
    tower, readout = model.model.vision_tower, nn.Linear(128, 10)
    parameters = [*tower.parameters(), *readout.parameters()]
    optimizer, schedule = optimise(parameters, steps)

    def logits(pixels: Tensor) -> Tensor:
        patches = tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        quadrants = reduce(patches, "b (r h c w) d -> b (r c) d", "mean", r=2, h=2, c=2, w=2)
        return rearrange(readout(quadrants), "b p k -> (b p) k")

    started = time.perf_counter()
    for step in range(1, steps + 1):
        pixels, labels = batch("train", 128, rng)
        loss = F.cross_entropy(logits(pixels), torch.from_numpy(labels).flatten(), label_smoothing=0.05)
        update(loss, parameters, optimizer, schedule)
        if step % 250 == 0 or step == steps:
            pixels, labels = batch("val", 500, np.random.default_rng(0))
            with torch.no_grad():
                right = (logits(pixels).argmax(-1).numpy() == labels.flatten()).mean()
            print(
                f"tower {step:5d}  loss {loss:.3f}  val {right:.4f}  {time.perf_counter() - started:.0f} s", flush=True
            )
    tower.requires_grad_(False)


def update(loss: Tensor, parameters: list[nn.Parameter], optimizer, schedule) -> None:
    """One clipped step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def pack(kinds: tuple[str, ...], labels: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Questions of these kinds about each picture, side by side behind its image tokens.

    Returns text tokens `b t`, targets `b t` (-100 where nothing is answered), positions `1 i+t` and the boolean
    attention mask `1 1 i+t i+t`. The layout is the same for every picture because a kind has one length.
    """
    tokens, targets = [], []
    for picture in labels:
        row, wanted, segments = [], [], [0] * IMAGE_TOKENS
        for segment, kind in enumerate(kinds, start=1):
            question, answer = ([VOCABULARY[word] for word in text.split()] for text in digits.ask(kind, picture, rng))
            row += question + answer
            wanted += [-100] * (len(question) - 1) + answer + [EOS]
            segments += [segment] * (len(question) + len(answer))
        tokens.append(row)
        targets.append(wanted)
    owner = torch.tensor(segments)
    index = torch.arange(len(owner))
    positions = torch.where(owner == 0, index, IMAGE_TOKENS + index - torch.searchsorted(owner, owner))
    visible = (owner[:, None] == owner) | (owner == 0)
    mask = visible & (index[:, None] >= index)
    return torch.tensor(tokens), torch.tensor(targets), positions[None], mask[None, None]


def text_logits(model: LlavaForConditionalGeneration, pixels: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor):
    """Logits `b t v` at the text tokens of packed questions."""
    with torch.no_grad():
        features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    decoder = model.model.language_model
    embeds = torch.cat([model.model.multi_modal_projector(features), decoder.embed_tokens(tokens)], dim=1)
    hidden = decoder(inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False)
    return model.lm_head(hidden.last_hidden_state[:, IMAGE_TOKENS:])


@torch.no_grad()
def validate(model: LlavaForConditionalGeneration, pictures: int = 500) -> dict[str, float]:
    """Teacher-forced accuracy per kind on val scans: all answer tokens and the end token right."""
    rng = np.random.default_rng(0)
    pixels, labels = batch("val", pictures, rng)
    scores = {}
    for kind in digits.KINDS:
        tokens, targets, positions, mask = pack((kind,), labels, rng)
        predicted = text_logits(model, pixels, tokens, positions, mask).argmax(-1)
        scores[kind] = ((predicted == targets) | (targets == -100)).all(-1).float().mean().item()
    return scores


@contextmanager
def thinned(decoder: nn.Module, rng: np.random.Generator) -> Iterator[None]:
    """Inside: every decoder layer is left out with probability `DROP`, for the whole batch."""
    layers = decoder.layers
    decoder.layers = nn.ModuleList(layer for layer in layers if rng.random() >= DROP)
    try:
        yield
    finally:
        decoder.layers = layers


def train_decoder(
    model: LlavaForConditionalGeneration, steps: int, language_steps: int, pictures: int, rng: np.random.Generator
) -> None:
    """Teach the decoder language, then projector and decoder to see; the loss on answer tokens only."""
    decoder, projector = model.model.language_model, model.model.multi_modal_projector
    parameters = [weight for part in (projector, decoder, model.lm_head) for weight in part.parameters()]
    started = time.perf_counter()
    for phase, last in (("language", language_steps), ("vision", steps)):
        optimizer, schedule = optimise(parameters, last)
        for step in range(1, last + 1):
            pixels, labels = batch("train", pictures, rng)
            reads = phase == "language" or step % REHEARSE == 0
            tokens, targets, positions, mask = pack(READ if reads else SEEN, labels, rng)
            with thinned(decoder, rng) if reads else nullcontext():
                logits = text_logits(model, pixels, tokens, positions, mask)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            update(loss, parameters, optimizer, schedule)
            if step % 200 == 0 or step == last:
                seconds = time.perf_counter() - started
                print(f"{phase} {step:5d}  loss {loss:.4f}  val {table(validate(model))}  {seconds:.0f} s", flush=True)


def table(scores: dict[str, float]) -> str:
    """Accuracies and their mean on one line."""
    return (
        "  ".join(f"{kind} {score:.3f}" for kind, score in scores.items())
        + f"  mean {np.mean(list(scores.values())):.4f}"
    )


def save(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Write the folder: weights stored in float16 under a float32 config, so that loading gives float32."""
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, max_new_tokens=4, do_sample=False)
    model.save_pretrained(out, state_dict={name: weight.half() for name, weight in model.state_dict().items()})
    build_processor().save_pretrained(out)


@torch.no_grad()
def evaluate(folder: Path, per_kind: int, size: int = 240) -> dict[str, float]:
    """Greedy `generate` through the processor on test scans; right means the whole answer and nothing after it."""
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    records = digits.examples("test", per_kind, seed=0)
    right: dict[str, list[bool]] = {kind: [] for kind in digits.KINDS}
    for start in range(0, len(records), size):
        part = records[start : start + size]
        images, prompts = [[r["image"]] for r in part], [r["prompt"] for r in part]
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        answers = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        for record, answer in zip(part, processor.batch_decode(answers), strict=True):
            said = answer.replace(SPECIAL["pad_token"], "").split()
            right[record["kind"]].append(said == [*record["answer"].split(), SPECIAL["eos_token"]])
    return {kind: float(np.mean(hits)) for kind, hits in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3600, help="decoder steps, seeing")
    parser.add_argument("--language-steps", type=int, default=600, help="decoder steps before, language alone")
    parser.add_argument("--tower-steps", type=int, default=1500, help="vision tower steps")
    parser.add_argument("--pictures", type=int, default=16, help="pictures per decoder step")
    parser.add_argument("--per-kind", type=int, default=2000, help="test questions per kind")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = build_model()
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    train_tower(model, args.tower_steps, rng)
    train_decoder(model, args.steps, args.language_steps, args.pictures, rng)
    save(model.eval(), args.out)
    print(f"test scans, {args.per_kind} questions per kind: {table(evaluate(args.out, args.per_kind))}", flush=True)


if __name__ == "__main__":
    main()
