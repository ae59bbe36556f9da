"""Bugs of saving, of stopping and of what a run goes on from."""

from tests.mutation.mutant import OURS, Mutant

FLIPS = "faults/test_flipped_bits.py::"
MODELS = "faults/test_saved_models.py::"
DISK = "faults/test_disk.py::"
FOLDERS = "faults/test_run_folders.py::"
LAST = "unit/training/test_last_checkpoint.py::"
FINITE = "unit/training/test_finite.py::"

MUTANTS = (
    Mutant(
        "checkpoints-not-checked",
        "core/checksums.py",
        "return None if whole else _damaged_record(path, sealed=whole is not None)",
        "return None",
        "a flipped bit loads as another weight",
        OURS,
        (FLIPS + "test_a_damaged_checkpoint_names_the_newest_good_one",),
    ),
    Mutant(
        "headers-not-checked",
        "core/checksums.py",
        "return None if whole else _damaged_record(path, sealed=whole is not None)",
        "return _damaged_record(path, sealed=False) or None",
        "a flipped bit in an archive's lists loads as another weight",
        OURS,
        (FLIPS + "test_a_flipped_bit_in_the_lists_of_records_is_refused",),
    ),
    Mutant(
        "shards-not-checked",
        "core/checksums.py",
        "name not in there or file_checksum(folder / name) != expected",
        "name not in there",
        "a flipped bit in a shard loads as another weight",
        OURS,
        (FLIPS + "test_a_flipped_bit_in_any_file_of_a_sharded_checkpoint_is_refused",),
    ),
    Mutant(
        "saved-models-not-checked",
        "pretrained.py",
        "if tensor_checksum(file.get_tensor(name)) != checksums.get(name):",
        "if name not in checksums:",
        "a flipped bit in safetensors loads as another weight",
        OURS,
        (MODELS + "test_a_flipped_bit_is_refused",),
    ),
    Mutant(
        "config-of-the-other-model",
        "pretrained.py",
        "SavedModel(config if belongs is None else described, shapes, dtypes, checksums)",
        "SavedModel(config, shapes, dtypes, checksums)",
        "an interrupted save leaves one model's configuration with the other's weights",
        OURS,
        (MODELS + "test_weights_of_an_interrupted_save_describe_themselves",),
    ),
    Mutant(
        "not-read-back",
        "core/saving.py",
        "if (damaged := damaged_record(partial)) is not None:",
        "if (damaged := None) is not None:",
        "a file that the disk did not keep replaces a good one",
        OURS,
        (DISK + "test_what_does_not_read_back_is_not_there",),
    ),
    Mutant(
        "runs-share-a-folder",
        "configuration/run_folder.py",
        "return any(next(folder.glob(trace), None) is not None for trace in _TRACES)",
        "return False",
        "a second run overwrites the first",
        OURS,
        (FOLDERS + "test_a_run_that_never_began_leaves_no_folder",),
    ),
    Mutant(
        "last-within-a-step",
        "training/last_checkpoint.py",
        "if _within_step(trainer) or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:",
        "if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:",
        "accumulated gradients are lost when a run goes on",
        OURS,
        (LAST + "test_it_is_saved_between_steps_only",),
    ),
    Mutant(
        "last-is-the-best",
        "training/last_checkpoint.py",
        "    return [LastCheckpoint()] if wanted and not present else []",
        "    for saver in wanted:\n        saver.save_last = True\n    return []",
        "the last checkpoint is the last improvement",
        "Lightning's ModelCheckpoint",
        (LAST + "test_last_is_the_last_step_when_the_metric_got_worse",),
    ),
    Mutant(
        "not-finite-gradients-update",
        "training/finite.py",
        "seen = _largest(module) if loss is None else loss + _largest(module).to(loss)",
        "seen = _largest(module) * 0 if loss is None else loss",
        "a NaN gradient goes into the weights",
        OURS,
        (FINITE + "test_the_run_stops_before_the_update",),
    ),
    Mutant(
        "skipped-steps-update",
        "training/finite.py",
        "                parameter.grad = None",
        "                parameter.grad = parameter.grad.nan_to_num() if parameter.grad is not None else None",
        "a skipped step moves the weights and the momentum",
        OURS,
        (FINITE + "test_skipped_steps_change_nothing_and_are_counted",),
    ),
    Mutant(
        "not-finite-weights-saved",
        "training/module.py",
        "        check_finite_weights(self, self._trainer)\n",
        "",
        "best and last are NaN",
        OURS,
        (FINITE + "test_no_checkpoint_of_such_weights_replaces_a_good_one",),
    ),
)
