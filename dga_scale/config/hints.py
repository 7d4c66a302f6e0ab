"""Hints for the settings of transformers' TrainingArguments and example scripts: their names here."""

_STEPS = "a run's length is --max_steps: epochs * rows of the corpus / --global_batch_size"
_ROWS = "the length of rows is chosen where text is sharded: tools/shard_corpus.py --sequence_length"
_TEXT = "text comes from --corpus, a folder that tools/shard_corpus.py wrote"
_JSON = "it belongs into the DeepSpeed JSON that --ds_config names"

HINTS: dict[str, str] = {
    "num_train_epochs": _STEPS,
    "epochs": _STEPS,
    "warmup_steps": "write --warmup_ratio, the share of --max_steps in which the learning rate rises",
    "model_name_or_path": "write --model",
    "model_name": "write --model",
    "tokenizer_name": "the tokenizer is the model's own",
    "report_to": "write --loggers: log.jsonl is always written, TensorBoard's files unless others are named",
    "logging_dir": "TensorBoard's files lie in --output_dir, with --loggers tensorboard",
    "run_name": "a run is called by its --output_dir",
    "train_file": _TEXT,
    "dataset_name": _TEXT,
    "validation_file": "held-out text comes from --eval_corpus, a folder that tools/shard_corpus.py wrote",
    "max_seq_length": _ROWS,
    "block_size": _ROWS,
    "deepspeed": "write --ds_config",
    "resume_from_checkpoint": "write --resume",
    "overwrite_output_dir": "a run never overwrites another: give a new --output_dir",
    "per_device_eval_batch_size": "evaluation has the rows of --per_device_train_batch_size in one pass",
    "train_batch_size": "write --global_batch_size, over all ranks, or --per_device_train_batch_size",
    "eval_strategy": "write --eval_steps",
    "evaluation_strategy": "write --eval_steps",
    "save_strategy": "write --save_steps",
    "logging_strategy": "write --logging_steps",
    "lr": "write --learning_rate",
    "optim": "write --optimizer",
    "do_train": "leave it out: a run trains, and evaluates where there is held-out text",
    "do_eval": "leave it out: a run evaluates where there is held-out text",
    "gradient_clipping": "write --max_grad_norm",
    "zero_stage": _JSON,
    "torch_dtype": "write --bf16, --fp16, or --bf16 false for float32",
}
"""What to do instead, as the end of a sentence."""
