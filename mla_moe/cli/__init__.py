"""`mla-moe`: look at models and runs, ask them, and move checkpoints, from the command line."""

import dataclasses
import json
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.orbax_arrays import OrbaxCheckpoint, run_directory, step_directory
from mla_moe.checkpoint.safetensors_reader import read_json
from mla_moe.config import (
    PRESETS,
    ConfigError,
    ModelConfig,
    Recipe,
    RLConfig,
    TaskConfig,
    load_recipe,
    preset,
    require,
    with_overrides,
)
from mla_moe.nn.model_costs import (
    count_parameters,
    kv_cache_bytes_per_token,
    mha_kv_cache_bytes_per_token,
    train_flops_per_token,
)
from mla_moe.training.console import Console, si


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what a model is and costs: shapes, parameters, KV bytes a token, FLOPs a token. Nothing is allocated."""

    model: tyro.conf.Positional[str]
    """A preset's name, a Hugging Face directory or its config.json, or a run's directory or checkpoint."""
    length: int = 4096
    """Tokens of a sequence, for the FLOPs."""

    def run(self) -> None:
        cfg = _config(self.model)
        Console(enabled=True).startup_table(self.model, _shapes(cfg) + _costs(cfg, self.length))


def _shapes(cfg: ModelConfig) -> list[tuple[str, str]]:
    scaling = "no scaling"
    if yarn := cfg.rope_scaling:
        scaling = f"YaRN {yarn.factor:g} x {yarn.original_max_position_embeddings}, mscale {yarn.mscale:g}, "
        scaling += f"beta {yarn.beta_fast:g}/{yarn.beta_slow:g}"
    normalised = "yes" if cfg.norm_topk_prob else "no"
    heads = (cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim)
    return [
        ("vocabulary", f"{cfg.vocab_size}"),
        ("hidden / layers / heads", f"{cfg.hidden_size} / {cfg.num_hidden_layers} / {cfg.num_attention_heads}"),
        ("dense / expert width", f"{cfg.intermediate_size} / {cfg.moe_intermediate_size}"),
        ("first dense layers", f"{cfg.first_k_dense_replace}"),
        ("routed / shared / top-k", f"{cfg.n_routed_experts} / {cfg.n_shared_experts} / {cfg.num_experts_per_tok}"),
        ("groups / top groups", f"{cfg.n_group} / {cfg.topk_group}"),
        ("score, normalised", f"{cfg.scoring_func}, {normalised}"),
        ("routed scaling", f"{cfg.routed_scaling_factor:g}"),
        ("q_lora_rank", f"{cfg.q_lora_rank or 'none'}"),
        ("kv_lora / nope / rope / v", " / ".join(map(str, heads))),
        ("rope theta, scaling", f"{cfg.rope_theta:g}, {scaling}"),
        ("max positions", f"{cfg.max_position_embeddings}"),
        ("norm epsilon", f"{cfg.rms_norm_eps:g}"),
        ("prediction modules", f"{cfg.num_nextn_predict_layers}"),
    ]


def _costs(cfg: ModelConfig, length: int) -> list[tuple[str, str]]:
    count = count_parameters(cfg)
    latent, multi_head = kv_cache_bytes_per_token(cfg), mha_kv_cache_bytes_per_token(cfg)
    return [
        ("parameters", f"{count.total:,} ({si(count.total)})"),
        ("active a token", f"{count.active:,} ({si(count.active)})"),
        ("in prediction modules", f"{count.mtp:,} ({si(count.mtp)})" if count.mtp else "none"),
        ("KV bytes a token", f"{latent:,} in bfloat16"),
        ("  multi-head attention", f"{multi_head:,} ({multi_head / latent:.1f} times as many)"),
        ("FLOPs a token", f"{si(train_flops_per_token(cfg, length))} to train on {length} tokens"),
    ]


def _config(model: str) -> ModelConfig:
    path = Path(model)
    if model in PRESETS or not path.exists():
        return preset(model)
    if path.is_dir() and (step := step_directory(path)) is not None:
        return OrbaxCheckpoint(step).cfg
    return ModelConfig.from_hf(read_json(path if path.is_file() else path / "config.json"))  # no weights are read


@dataclasses.dataclass(frozen=True)
class Convert:
    """Move a checkpoint between the layouts of Hugging Face and of this project, or change its type, in little memory.

    The new directory appears when it is whole, or not at all. Of a run, parameters and router biases are taken.
    """

    src: tyro.conf.Positional[Path]
    """A Hugging Face directory, or a run's directory or checkpoint."""
    dst: tyro.conf.Positional[Path]
    """The directory to be made."""
    to: Literal["hf", "orbax"] = "hf"
    """What it becomes: config.json and safetensors, or a checkpoint that `--init-from` and Orbax read."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; by default each keeps its own, and FP8 blocks become bfloat16."""
    fp8: bool = False
    """Write matrices in FP8 blocks of 128 x 128, as in DeepSeek's releases."""

    def run(self) -> None:
        import jax.numpy as jnp

        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns that of one process nothing is merged
        convert(self.src, self.dst, to=self.to, dtype=self.dtype and jnp.dtype(self.dtype), fp8=self.fp8)
        size = sum(file.stat().st_size for file in self.dst.rglob("*") if file.is_file())
        print(f"{self.dst}: {size / 1e9:.2f} GB")


@dataclasses.dataclass(frozen=True)
class Report:
    """Write a run's report.html."""

    run_dir: tyro.conf.Positional[Path]

    def run(self) -> None:
        from mla_moe.report.page import write_report

        print(write_report(self.run_dir))


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, or answer it as one message of a chat."""

    checkpoint: tyro.conf.Positional[Path]
    """A Hugging Face directory, or a run's directory or checkpoint. Without a tokenizer, text is bytes."""
    prompt: str
    chat: bool = False
    """Put the prompt into the checkpoint's chat template."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Strings that end the answer."""
    speculative: bool = False
    """Let the prediction module guess ahead: the same text, up to rounding, and sooner."""
    int8_kv_cache: bool = False
    """Keep the cache in eight bits: half the memory of bfloat16."""

    def run(self) -> None:
        from mla_moe.inference.request import Request
        from mla_moe.inference.terminal import print_completion

        model, language = _model_and_language(self.checkpoint)
        message = [{"role": "user", "content": self.prompt}]
        tokens = language.encode_chat(message) if self.chat else language.encode(self.prompt)
        request = Request(
            tokens, self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.min_p, self.seed,
            stop_ids=language.stop_ids, stop=self.stop,
        )  # fmt: skip
        print_completion(model, language, request, speculative=self.speculative, int8_kv_cache=self.int8_kv_cache)


@dataclasses.dataclass(frozen=True)
class Eval:
    """Ask held-out questions and judge the answers: greedy, opened with <think>, and several sampled to each."""

    checkpoint: tyro.conf.Positional[Path]
    """A Hugging Face directory, or a run's directory or checkpoint. Without a tokenizer, text is bytes."""
    task: str | None = None
    """arithmetic; reasoning_gym:NAME; or the path of JSON lines with question, answer. By default a run's own."""
    options: tuple[str, ...] | None = None
    """Settings of the task, each key=value. By default a run's own, if it is asked its own task."""
    template: str | None = None
    """r1_zero, chat, or a text with {question} in it. By default a run's own, else r1_zero."""
    split: Literal["test", "validation"] = "test"
    prompts: int = 128
    """Questions: the first of the split."""
    samples: int = 4
    """Answers sampled to each question, for pass@k and the majority's; greedy answers come on top."""
    max_prompt_tokens: int | None = None
    """Questions with a longer prompt are passed over, and counted. By default a run's own, else 512."""
    max_new_tokens: int | None = None
    """By default a run's own, else 1024."""
    temperature: float | None = None
    """Of the samples. By default a run's own, else 1."""
    slots: int = 64
    """Answers that are written at a time."""
    seed: int = 0
    json: bool = False
    """Print the metrics as one JSON object in place of a table."""

    def run(self) -> None:
        import rich.console

        from mla_moe.rl.evaluate import evaluate, table
        from mla_moe.rl.rewards import Reward
        from mla_moe.rl.rollout import Rollout
        from mla_moe.rl.tasks.task import open_task, require_questions

        require(self.prompts >= 1, "prompts", self.prompts, "at least 1")
        require(self.samples >= 0, "samples", self.samples, "0 or more")
        settings, rl = self._settings()
        task = open_task(settings)
        require_questions(task, self.split, "prompts", self.prompts)
        model, language = _model_and_language(self.checkpoint)
        limit, length = model.cfg.max_position_embeddings, rl.max_prompt_tokens + rl.max_new_tokens
        fix = f"at most the model's {limit} positions"
        require(length <= limit, "max_prompt_tokens + max_new_tokens", length, fix)
        with Reward(settings, task) as reward, rich.console.Console(stderr=True).status("compiling") as status:
            rollout = Rollout(rl, settings.template, task, reward, language)
            rollout.load_weights(model)
            found = evaluate(rollout, self.split, self.prompts, self.samples, self.seed, status.update)
        asked = {"task": settings.name, "options": settings.options, "split": self.split, "prompts": self.prompts}
        metrics = found.metrics() | {"prompts_too_long": rollout.too_long}
        if self.json:
            print(json.dumps(asked | metrics))
        else:
            what = [
                ("task", " ".join((settings.name, *settings.options))),
                (f"{self.split} questions", f"{self.prompts}"),
            ]
            Console(enabled=True).result_table("held-out questions", what + table(metrics))

    def _settings(self) -> tuple[TaskConfig, RLConfig]:
        """What is asked, and how. Nothing that a run brings is executed: the reward function of its recipe is left out.

        Raises `ConfigError` where there is no run to take the task from."""
        step = step_directory(self.checkpoint)
        run = run_directory(step) if step else None
        require(run is not None or self.task is not None, "task", self.task, "name one; only a run has its own")
        recipe = load_recipe(run / "recipe.json") if run else Recipe(run_dir="")
        own = recipe.task if self.task in (None, recipe.task.name) else TaskConfig(template=recipe.task.template)
        given = self._given("options", "template") | ({"name": self.task} if self.task else {})
        rl = RLConfig(
            max_prompt_tokens=recipe.rl.max_prompt_tokens,
            max_new_tokens=recipe.rl.max_new_tokens,
            temperature=recipe.rl.temperature,
            max_num_seqs=self.slots,
            routing_replay=False,
        )
        limits = self._given("max_prompt_tokens", "max_new_tokens", "temperature")
        return dataclasses.replace(own, function=None, **given), dataclasses.replace(rl, **limits)

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a checkpoint over HTTP, with OpenAI's interface."""

    checkpoint: tyro.conf.Positional[Path]
    """A Hugging Face directory, or a run's directory or checkpoint. Without a tokenizer, text is bytes."""
    host: str = "127.0.0.1"
    """Who may connect: only this machine unless you say otherwise. There is no password."""
    port: int = 8000
    slots: int = 8
    """Requests that run at a time."""
    capacity: int | None = None
    """Most tokens of a request, its answer included. By default 4096, or the model's positions if they are fewer."""
    max_waiting: int = 256
    """Requests beyond these are turned away with status 429."""
    max_seconds: float = 600.0
    """Longest time that an answer may take, waiting included; then it is given up, with status 504."""
    speculative: bool = False
    """Let the prediction module guess ahead: the same text, up to rounding, and sooner."""
    int8_kv_cache: bool = False
    """Keep the cache in eight bits: half the memory of bfloat16."""

    def run(self) -> None:
        from mla_moe.inference.engine import Engine
        from mla_moe.inference.openai_server import application, serve

        require(1 <= self.port < 1 << 16, "port", self.port, "must be in [1, 65535]")
        model, language = _model_and_language(self.checkpoint)
        capacity = min(4096, model.cfg.max_position_embeddings) if self.capacity is None else self.capacity
        engine = Engine(
            model, slots=self.slots, capacity=capacity, decode=language.decode, speculative=self.speculative,
            int8_kv_cache=self.int8_kv_cache,
        )  # fmt: skip
        limits = {"max_waiting": self.max_waiting, "seconds": self.max_seconds}
        app = application(engine, language, self.checkpoint.resolve().name, **limits)
        print(f"http://{self.host}:{self.port}/v1  (stop with Ctrl-C)")
        serve(app, self.host, self.port)


def _model_and_language(checkpoint: Path):
    """A checkpoint's model, and how text goes into it and comes out."""
    from mla_moe.checkpoint.pretrained import load_pretrained
    from mla_moe.checkpoint.tokenizer_files import tokenizer_file
    from mla_moe.text.chat_tokenizer import load_chat_tokenizer
    from mla_moe.text.tokenizer import ByteTokenizer, HFTokenizer

    file = tokenizer_file(checkpoint)
    model = load_pretrained(checkpoint)
    tokenizer = HFTokenizer(file) if file else ByteTokenizer()
    require(
        tokenizer.vocab_size <= model.cfg.vocab_size,
        "tokenizer",
        tokenizer.name,
        f"has {tokenizer.vocab_size} tokens, more than the model's {model.cfg.vocab_size}: it is another model's",
    )
    return model, load_chat_tokenizer(file.parent if file else checkpoint, tokenizer)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a recipe for devices that need not be here: does it fit, what does it send, how long is a step? Its
    fields can be set as for train.py: `--mesh.fsdp 32`."""

    recipe: tyro.conf.Positional[Path]
    """A recipe's .py or .json file."""
    topology: str
    """Where it is to run: v5e:4x4, v5p:8x8x8, v6e:16x16, v7x:4x4x8, h100:HOSTSxGPUS, cpu."""
    slices: int = 1
    """How many of them, with a slow network between: they lie along mesh.data."""
    stage: Literal["train", "decode", "rl"] = "train"
    """A training step; a token for each of `batch` sequences; or the gradients of `rl.micro_batch_size` rows of answers."""
    batch: int = 128
    """Sequences that are decoded."""
    context: int = 4096
    """Tokens that each of them has in the cache."""
    int8_kv_cache: bool = False
    """Decode with a cache in eight bits."""
    search: bool = False
    """Try other meshes, rematerialisation and accumulation too, and rank what fits. Plans are kept under
    ~/.cache/mla_moe."""
    json: bool = False
    """Print everything as JSON."""

    def run(self, flags: list[str]) -> None:
        from mla_moe.plan.topology import open_topology, quiet_compilers

        quiet_compilers()

        from mla_moe.plan import report
        from mla_moe.plan.search import cached_plan, search

        recipe = with_overrides(load_recipe(self.recipe), flags, f"mla-moe plan {self.recipe}")
        topology = open_topology(self.topology, self.slices)
        console = Console(enabled=True)
        if self.search:
            require(self.stage == "train", "stage", self.stage, "search varies training")
            ranked = search(recipe, topology, (lambda line: None) if self.json else console.say)
            if self.json:
                print(json.dumps([{"recipe": json.loads(r.to_json()), **plan.to_json()} for r, plan in ranked]))
            else:
                report.show_ranking(ranked, console)
            return
        asked = {"batch": self.batch, "context": self.context, "int8_kv_cache": self.int8_kv_cache}
        how = asked if self.stage == "decode" else {}
        plan = cached_plan(recipe, topology, self.stage, **how)
        if self.json:
            print(json.dumps(plan.to_json(), indent=2))
        else:
            report.show(plan, console)


Command = (
    Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
)


def main(args: list[str] | None = None) -> int:
    parse = partial(tyro.cli, Command, prog="mla-moe", description=__doc__, args=args)
    try:
        command, flags = parse(return_unknown_args=True)
        if isinstance(command, Plan):
            command.run(flags)
        elif flags:
            parse()  # says what is wrong with them, and exits
        else:
            command.run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor what is flushed at exit
        return 141
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
