"""``fit``, ``validate``, ``test`` and ``predict``: the commands that Lightning's trainer runs."""

import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelSummary
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import nn

from mtp_modules.commands.catalogue import DEBUG, OWN, PROG
from mtp_modules.commands.next_step import next_command
from mtp_modules.configuration import LightningSentenceParser, check_sizes, link_sizes
from mtp_modules.configuration.run_folder import (
    RunConfiguration,
    RunFolder,
    check_fixed_folders,
    find_named,
    requeued_checkpoint,
)
from mtp_modules.configuration.trainer_folders import checkpoint_folders, configured_folder, save_in, use_folder
from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Description
from mtp_modules.loading import CHECKPOINT_KEY, find_checkpoint, is_sharded, read_checkpoint
from mtp_modules.training import (
    GracefulStop,
    GroupedCharts,
    HeadsProgressBar,
    HeadsTable,
    LastCheckpoint,
    MTPModule,
    PartsSummary,
    PredictionWriter,
    check_strategy_name,
    check_trainer,
    choose_draft_tokens,
    fill_data_parallel_size,
    init_from,
    prepare_objectives,
)
from mtp_modules.training.checkpoint_io import write_atomically
from mtp_modules.training.checkpointing import check_description, tokenizer_of
from mtp_modules.training.descriptions import check_same_model
from mtp_modules.training.limits import check_numbers
from mtp_modules.training.resuming import check_configured_optimizer, check_resumable
from mtp_modules.training.strategies import loads_by_itself


class MTPCLI(LightningCLI):
    """LightningCLI for :class:`~mtp_modules.training.MTPModule` and any data module."""

    def __init__(self, *, only_parser: bool = False) -> None:
        self.only_parser = only_parser
        self.graceful_stop = GracefulStop()
        self.saved_model: Description | None = None
        self.saved: dict[str, Any] = {}
        self.held: tuple[Path, dict[str, Any]] | None = None
        self.run_folder: RunFolder | None = None
        with ExitStack() as self.cleanup:  # what is to be done when the command has ended, whatever its end
            super().__init__(
                model_class=MTPModule,
                datamodule_class=LightningDataModule,
                subclass_mode_data=True,
                save_config_callback=RunConfiguration,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={},
                parser_class=LightningSentenceParser,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                seed_everything_default=1,
                parser_kwargs={
                    "prog": PROG,
                    "description": "Train and measure models.",
                    "epilog": f"Also: {', '.join(OWN)} ({PROG} --help). {DEBUG}",
                },
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words of the command line, unless only the parser is asked for."""
        if self.only_parser:
            raise _ParserMade
        words = [str(word) for word in (sys.argv[1:] if args is None else args)]
        if words[:1] != ["fit"] and any(word.partition("=")[0] == "--init_from" for word in words):
            refuse("init_from", "is for fit; name the model's checkpoint by ckpt_path.")
        super().parse_arguments(parser, args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Fill in every size that another component defines."""
        link_sizes(parser)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Let ``fit`` start from the weights of another run."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        start = "A checkpoint, a run's folder or a save_pretrained folder whose weights a new run starts from."
        if subcommand != "fit":
            start = "Of the configuration that fit wrote; not used here."
        parser.add_argument("--init_from", type=str | None, default=None, help=start)
        return parser

    def _parse_ckpt_path(self) -> None:
        """Find and read the checkpoint, and reject an invalid one before anything is built."""
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if self.config.subcommand == "fit" and path and config.get("init_from"):
            refuse("init_from", "starts a new run, and ckpt_path continues one; leave one of them out (null).")
        if not path and self.config.subcommand == "fit":
            path = requeued_checkpoint(configured_folder(config.trainer))
        if not path:
            return
        if path in ("best", "last"):
            path = find_named(path, configured_folder(config.trainer), checkpoint_folders(config.trainer))
        elif path == "hpc" or str(path).startswith("registry"):
            refuse(
                "ckpt_path", f"{path!r} is not supported; give last, best, a checkpoint file, or the folder of a run."
            )
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
        if config.get("weights_only") is None:
            config.weights_only = True  # a checkpoint of this package holds no objects
        self.saved = checkpoint[CHECKPOINT_KEY]
        self.saved_model = self.saved["model"]
        if not itself and found.is_file():
            self.held = found, checkpoint
        config.ckpt_path = str(found)

    def _set_seed(self) -> None:
        """Reject a seed that random number generators do not take."""
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool) and seed is not None and not 0 <= seed < 2**32:
            refuse("seed_everything", f"must lie in 0..2**32 - 1, got {seed}.")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Reject strategies that Lightning fails to build, and choose the folder of a run."""
        config = self.config[self.subcommand]
        check_strategy_name(_strategy_name(config))
        check_numbers(config.trainer.as_dict())
        if self.subcommand == "fit":
            self.graceful_stop.listen(keep=True)
            self.cleanup.callback(self.graceful_stop.restore)
            if not config.trainer.fast_dev_run:
                resumed = Path(config.ckpt_path) if config.get("ckpt_path") else None
                if resumed is None:
                    check_fixed_folders(config.trainer)
                self.run_folder = RunFolder(configured_folder(config.trainer), resumed)
                self.cleanup.callback(self._release_folder, self.run_folder)
                use_folder(config.trainer, self.run_folder.path)
        if config.get("model.sharding.init_args.init_on_meta"):
            self.parser.add_instantiator(_on_meta, class_type=nn.Module, subclasses=True)

    def _release_folder(self, folder: RunFolder) -> None:
        """Leave the run's folder, and no trace of a run that failed before its first step."""
        trainer: Trainer | None = getattr(self, "trainer", None)
        folder.release(begun=trainer is not None and (trainer.global_step > 0 or trainer.state.finished))

    def after_instantiate_classes(self) -> None:
        """Reject a configuration with contradicting or incompatible options."""
        fill_data_parallel_size(self.trainer)
        check_trainer(self.trainer)
        self.graceful_stop.trainer = self.trainer
        if self.run_folder is not None:
            save_in(self.run_folder.path, self.trainer)
        write_atomically(self.trainer, *(self.held or ()))
        if self.saved_model is not None:
            check_same_model(self.model.model, tokenizer_of(self), self.saved, "ckpt_path")
            if self.subcommand == "fit" and loads_by_itself(_strategy_name(self.config[self.subcommand])):
                check_configured_optimizer(self.model, self.saved)
            check_description(self.model, self.saved_model, "the checkpoint")
        check_sizes(self.config[self.subcommand], self.config_init[self.subcommand])

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks of every run."""
        trainer_config = self._get(self.config_init, "trainer")
        own = [self.graceful_stop, HeadsTable(), GroupedCharts()]
        given = trainer_config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        summarised = any(isinstance(callback, ModelSummary) for callback in given)
        if trainer_config.get("enable_model_summary") is not False and not summarised:
            own.append(PartsSummary())
        if trainer_config.get("enable_progress_bar") is not False:
            own.append(HeadsProgressBar())
        saving = trainer_config.get("enable_checkpointing") is not False
        if self.subcommand == "fit" and saving and not any(isinstance(callback, Checkpoint) for callback in given):
            own.append(LastCheckpoint())  # Lightning's own saves after validations alone, of which a short run has none
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
            prepare_objectives(self.model, self.datamodule)

    def after_predict(self) -> None:
        """Reject data without rows to predict, for which Lightning does nothing."""
        if not sum(self.trainer.num_predict_batches):
            refuse(
                "predict", "the data has no batch to predict; give it a test split, or another limit_predict_batches."
            )

    def after_fit(self) -> None:
        """End with the test table of the best checkpoint, or with the right exit status if the run was stopped."""
        if self.graceful_stop.received is not None:
            sys.exit(128 + self.graceful_stop.received)
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # lightning sets it dynamically
            return
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        self.trainer.test(
            self.model, datamodule=self.datamodule, ckpt_path=best or None, verbose=False, weights_only=True
        )
        if self.trainer.is_global_zero and (saved := best or self._last()):
            command = next_command(saved, self.model.model, tokenizer_of(self), self.trainer.test_dataloaders)
            print(f"Checkpoint: {saved}\nNext: {command}")

    def _last(self) -> str:
        """Return the checkpoint of the last step, if there is one."""
        savers = (callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, LastCheckpoint))
        return next((str(saver.path) for saver in savers if saver.path is not None and saver.path.exists()), "")


class _ParserMade(Exception):  # noqa: N818  # no error
    """The parser is there, and nothing is to be parsed."""


def trainer_parsers() -> dict[str, LightningArgumentParser]:
    """Return the parser of every command of the trainer."""
    made = MTPCLI.__new__(MTPCLI)
    with suppress(_ParserMade):
        MTPCLI.__init__(made, only_parser=True)
    return dict(made._subcommand_parsers)


def _strategy_name(config: Namespace) -> Any:
    """Return the registered name of a strategy, or the path of its class."""
    strategy = config.trainer.strategy
    return strategy.class_path if isinstance(strategy, Namespace) else strategy


def _on_meta(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Build a module on the meta device."""
    with torch.device("meta"):
        return cls(*args, **kwargs)
