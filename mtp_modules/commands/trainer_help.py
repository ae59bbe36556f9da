"""The short help of the trainer's commands: what people set, in two screens; ``--help.all`` has every option."""

from mtp_modules.commands.catalogue import DEBUG, PROG, TRAINER

_RUN = """\
what to run
  --config FILE                     YAML; later files and options override earlier ones
  --print_config                    print the configuration that results, and end
  --seed_everything N               seed of all random numbers (default: 1)
"""
_START = """\
  --init_from PATH                  start a new run from the weights of another
  --ckpt_path PATH                  resume a run: last, best, a checkpoint, a folder
"""
_CHECKPOINT = """\
  --ckpt_path PATH                  what to load: last, best, a checkpoint, a folder
"""
_LENGTH = """\
how long
  --trainer.max_steps N             optimizer steps
  --trainer.max_epochs N            passes over the training data
  --trainer.max_time D:H:M:S        time
  --trainer.gradient_clip_val X     largest norm of the gradient
  --trainer.accumulate_grad_batches N   batches of an optimizer step
  --trainer.val_check_interval N    batches between two validations
"""
_WHERE = """\
where
  --trainer.accelerator NAME        cpu, gpu, mps or auto
  --trainer.devices N               number of devices, or auto
  --trainer.strategy NAME           ddp, ModelParallelStrategy, or auto
  --trainer.precision NAME          32-true, bf16-mixed, 16-mixed, 64-true
  --trainer.logger CLASS            TensorBoardLogger, CSVLogger, WandbLogger, false
  --trainer.default_root_dir FOLDER  of the run, if the logger names none
"""
_MODEL = """\
the model
  --model.trunk CLASS               TransformerTrunk, RecurrentTrunk, HuggingFaceTrunk
  --model.heads CLASS               RecurrentHeads, LinearHeads, ParallelHeads, ...
  --model.heads.num_horizons N      how many tokens are predicted at once
"""
_LEARNING = """\
  --model.loss.weights CLASS        UniformWeights, GeometricWeights, ...
  --model.optimizer CLASS           MuonWithAdamW, AdamW, or any of torch.optim
  --model.optimizer.lr X            learning rate
  --model.lr_schedule CLASS         WarmupDecay; constant if null
  --model.freeze [trunk]            parts that are not trained
"""
_DATA = """\
the data
  --data CLASS                      TextDataModule, TaskDataModule, ...
  --data.sources [PATH,...]         files, folders, patterns, or stdlib
  --data.tokenizer CLASS            ByteTokenizer, HuggingFaceTokenizer, ...
  --data.window N                   tokens that a row is read in
  --data.batch_size N               rows of a batch
"""


def trainer_help(command: str) -> str:
    """Return the short help of a command of the trainer.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
    """
    fit = command == "fit"
    sections = [_RUN + (_START if fit else _CHECKPOINT), *([_LENGTH] if fit else []), _WHERE]
    sections += [_MODEL + (_LEARNING if fit else ""), _DATA]
    usage = f"usage: {PROG} {command} --config FILE [options]"
    more = f"--help.all: all options   --model.heads.help CLASS: options of a class\n{DEBUG}"
    return "\n".join([usage, TRAINER[command], *(section.rstrip() for section in sections), more])
