"""The command line: ``fit``, ``validate``, ``test`` and ``predict`` by LightningCLI, and commands of our own."""

import inspect
import itertools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import nn

from mtp_modules.commands.diagnose import diagnose
from mtp_modules.commands.exchange import export, import_
from mtp_modules.commands.generate import generate
from mtp_modules.commands.report import report
from mtp_modules.commands.sample import sample
from mtp_modules.commands.study import study
from mtp_modules.configuration import LightningSentenceParser, SentenceParser, check_sizes, link_sizes
from mtp_modules.core.checks import refusal_behind, refuse
from mtp_modules.core.component import Description
from mtp_modules.loading import CHECKPOINT_KEY, find_checkpoint, is_sharded, read_checkpoint
from mtp_modules.training import (
    GracefulStop,
    HeadsProgressBar,
    HeadsTable,
    MTPModule,
    PredictionWriter,
    check_strategy_name,
    check_trainer,
    choose_draft_tokens,
    fill_data_parallel_size,
    init_from,
)
from mtp_modules.training.checkpointing import HeldCheckpoint, check_description, tokenizer_of
from mtp_modules.training.descriptions import check_same_model
from mtp_modules.training.resuming import check_configured_optimizer, check_resumable
from mtp_modules.training.strategies import loads_by_itself

COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "study": study,
    "diagnose": diagnose,
    "report": report,
    "export": export,
    "import": import_,
    "sample": sample,
}


class MTPCLI(LightningCLI):
    """LightningCLI for :class:`~mtp_modules.training.MTPModule` and any data module."""

    def __init__(self) -> None:
        self.graceful_stop = GracefulStop()
        self.saved_model: Description | None = None
        self.saved: dict[str, Any] = {}
        self.held: HeldCheckpoint | None = None
        super().__init__(
            model_class=MTPModule,
            datamodule_class=LightningDataModule,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={},
            parser_class=LightningSentenceParser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=1,
            parser_kwargs={
                "prog": "python -m mtp_modules",
                "epilog": f"Also: {', '.join(COMMANDS)} (python -m mtp_modules {next(iter(COMMANDS))} --help).",
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Fill in every size that another component defines."""
        link_sizes(parser)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Let ``fit`` start from the weights of another run."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            start = "A checkpoint, a run's folder or a save_pretrained folder whose weights a new run starts from."
            parser.add_argument("--init_from", type=str | None, default=None, help=start)
        return parser

    def _parse_ckpt_path(self) -> None:
        """Find and read the checkpoint, and reject an invalid one before anything is built."""
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if path and config.get("init_from"):
            refuse("init_from", "starts a new run, and ckpt_path continues one; leave one of them out (null).")
        if not path or path in ("best", "last", "hpc") or str(path).startswith("registry"):
            return
        # Training continues from the last checkpoint, everything else uses the best.
        preferred = ("last.ckpt", "best.ckpt") if self.config.subcommand == "fit" else ("best.ckpt", "last.ckpt")
        found = find_checkpoint(path, preferred=preferred)
        if found.is_dir() and not is_sharded(found):
            start = f" start a new run from it with --init_from {found}, or" if self.config.subcommand == "fit" else ""
            refuse("ckpt_path", f"{found} holds a model without the state of its training;{start} give a .ckpt file.")
        itself = loads_by_itself(_strategy_name(config))
        checkpoint = read_checkpoint(found, mapped=itself)
        if self.config.subcommand == "fit":
            check_resumable(checkpoint, sharded=is_sharded(found))
        self.saved = checkpoint[CHECKPOINT_KEY]
        self.saved_model = self.saved["model"]
        if not itself and found.is_file():
            self.held = HeldCheckpoint(found, checkpoint)
        config.ckpt_path = str(found)

    def before_instantiate_classes(self) -> None:
        """Reject strategies that Lightning fails to build, and build the model on the meta device if configured."""
        config = self.config[self.subcommand]
        check_strategy_name(_strategy_name(config))
        if config.get("model.sharding.init_args.init_on_meta"):
            self.parser.add_instantiator(_on_meta, class_type=nn.Module, subclasses=True)

    def after_instantiate_classes(self) -> None:
        """Reject a configuration with contradicting or incompatible options."""
        fill_data_parallel_size(self.trainer)
        check_trainer(self.trainer)
        if self.held is not None:
            self.held.put_into(self.trainer)
        if self.saved_model is not None:
            check_same_model(self.model.model, tokenizer_of(self), self.saved, "ckpt_path")
            if self.subcommand == "fit" and loads_by_itself(_strategy_name(self.config[self.subcommand])):
                check_configured_optimizer(self.model, self.saved)
            check_description(self.model, self.saved_model, "the checkpoint")
        check_sizes(self.config[self.subcommand], self.config_init[self.subcommand])

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks of every run."""
        trainer_config = self._get(self.config_init, "trainer")
        own = [self.graceful_stop, HeadsTable()]
        if trainer_config.get("enable_progress_bar") is not False:
            own.append(HeadsProgressBar())
        if self.subcommand == "predict":
            own.append(PredictionWriter())
        self.trainer_defaults["callbacks"] = own
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Load initial weights, and choose the draft vocabulary, unless a checkpoint has it."""
        if start := self.config[self.subcommand].get("init_from"):
            self.trainer.precision_plugin.convert_module(self.model)  # before weights of more digits are rounded
            init_from(self.model.model, start, tokenizer=tokenizer_of(self))
        if self.saved_model is None:
            choose_draft_tokens(self.model.model, self.datamodule)

    def after_fit(self) -> None:
        """End with the test table of the best checkpoint, or with the right exit status if the run was stopped."""
        if self.graceful_stop.received is not None:
            sys.exit(128 + self.graceful_stop.received)
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # lightning sets it dynamically
            return
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None, verbose=False)
        if best and self.trainer.is_global_zero:
            print(f"Checkpoint: {best}\nNext: python -m mtp_modules generate --ckpt_path {best} --compare true")


def _strategy_name(config: Namespace) -> Any:
    """Return the registered name of a strategy, or the path of its class."""
    strategy = config.trainer.strategy
    return strategy.class_path if isinstance(strategy, Namespace) else strategy


def _on_meta(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Build a module on the meta device."""
    with torch.device("meta"):
        return cls(*args, **kwargs)


def main() -> None:
    """Run the command that ``sys.argv`` names."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    harmless = (
        ".*does not have many workers",
        "Couldn't infer the batch indices",
        "Precision bf16-mixed is not supported by the model summary",
        "FSDP2-wrapped module .* returned a view",
    )
    warnings.filterwarnings("ignore", message="|".join(harmless))
    try:
        if command in COMMANDS:
            _run(command, sys.argv[2:])
        elif command in MTPCLI.subcommands() or command.startswith("-"):
            MTPCLI()
        else:
            known = ", ".join([*MTPCLI.subcommands(), *COMMANDS])
            refuse("command", f"{command!r} is unknown. Known: {known}." if command else f"none given. Known: {known}.")
    except ValueError as error:
        refused = refusal_behind(error)
        if refused is None:
            raise
        sys.exit(f"error: {' '.join(str(refused).split())}")


def _run(command: str, arguments: list[str]) -> None:
    """Run a command of our own."""
    function = COMMANDS[command]
    parser = SentenceParser(prog=f"python -m mtp_modules {command}", description=function.__doc__)
    parser.add_function_arguments(function, as_positional=False)
    function(**parser.instantiate(parser.parse_args(_spelled_out(function, arguments))).as_dict())


def _spelled_out(function: Callable[..., None], arguments: list[str]) -> list[str]:
    """Add the name of the first argument, and ``true`` after a switch, where they are left out."""
    parameters = inspect.signature(function).parameters
    if arguments and not arguments[0].startswith("-"):
        arguments = [f"--{next(iter(parameters))}", *arguments]
    written = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        written.append(argument)
        name = argument.removeprefix("--")
        if argument.startswith("--") and name in parameters and parameters[name].annotation is bool:
            written += ["true"] if following.startswith("--") else []
    return written
