"""What people call things elsewhere, and what to write here.

Names and values of transformers, Lightning, DeepSpeed, nanoGPT, torchtitan and axolotl that a configuration
here does not have, each with the answer to who writes it.
"""

# Names -> the answer.  Fields are named as SECTION.FIELD; a test holds each to be one.
_ANSWERS = {
    # how long, and in which batches
    "epochs epoch num_epochs n_epochs max_epochs num_train_epochs": (
        "write train.steps: an epoch is as many steps as the data's tokens / train.batch_tokens"
    ),
    "max_steps num_steps n_steps total_steps train_steps training_steps num_train_steps max_train_steps "
    "max_iters num_iterations iterations iters": "write train.steps",
    "max_tokens total_tokens train_tokens num_tokens": (
        "write train.steps: as many as the tokens / train.batch_tokens"
    ),
    "batch_size train_batch_size global_batch_size total_batch_size batch bs": (
        "write train.batch_tokens, the tokens of a step over all workers (samples x data.seq_len), or "
        "train.micro_batch, the samples that a worker takes at once"
    ),
    "micro_batch_size micro_batchsize device_batch_size local_batch_size per_device_batch_size "
    "per_device_train_batch_size train_micro_batch_size_per_gpu": (
        "write train.micro_batch, the samples that a worker takes at once"
    ),
    "gradient_accumulation_steps gradient_accumulation grad_accumulation_steps grad_accum grad_acc_steps "
    "accumulate_grad_batches accumulation_steps accum_steps": (
        "leave it out: it follows from train.batch_tokens / (train.micro_batch x data.seq_len x "
        "cluster.workers)"
    ),
    "block_size sequence_length seq_length sequence_len max_length max_seq_length context_length context_len "
    "ctx_len cutoff_len": "write data.seq_len, and model.max_seq_len where it is longer than that",
    # the optimizer and its schedule
    "learning_rate max_lr peak_lr base_lr initial_lr": "write optimizer.lr",
    "min_lr lr_min eta_min final_lr end_lr min_learning_rate lr_end": (
        "write schedule.min_lr_ratio, a share of optimizer.lr"
    ),
    "warmup warm_up num_warmup_steps lr_warmup_steps warmup_iters lr_warmup_iters": (
        "write schedule.warmup_steps"
    ),
    "warmup_ratio warmup_fraction warmup_tokens": "write schedule.warmup_steps, a number of steps",
    "lr_scheduler lr_scheduler_type lr_schedule scheduler scheduler_type lr_decay_style": (
        "write schedule.name: cosine, linear, constant, wsd or two_stage"
    ),
    "optim optimizer_name optimizer_type optim_type": "write optimizer.name",
    "beta1 beta2 adam_beta1 adam_beta2 beta_1 beta_2": "write optimizer.betas: [0.9, 0.95]",
    "epsilon adam_epsilon adam_eps": "write optimizer.eps",
    "wd l2 weight_decay_rate": "write optimizer.weight_decay",
    "optim_bits state_dtype optimizer_dtype optimizer_state_dtype use_8bit_adam": (
        "write optimizer.states: int8, bf16 or fp32"
    ),
    "max_grad_norm max_norm grad_clip grad_norm_clip gradient_clipping gradient_clip gradient_clip_val "
    "clip_grad clip_grad_norm clip_gradients clip": "write train.clip_norm",
    # the machines
    "device accelerator cuda gpu use_gpu use_cuda no_cuda use_cpu device_map": (
        "write cluster.gpus_per_worker: auto takes GPUs where there are any, 0 trains on CPUs"
    ),
    "gpus n_gpus num_gpus n_gpu ngpus devices num_devices": (
        "write cluster.workers, each of which has cluster.gpus_per_worker"
    ),
    "num_workers n_workers dataloader_num_workers num_dataloader_workers": (
        "write cluster.workers for the processes that train; reading the data needs no number"
    ),
    "num_nodes nnodes nodes n_nodes nproc nproc_per_node world_size num_processes num_replicas dp_size "
    "data_parallel_size": "write cluster.workers, over all machines",
    "tensor_parallel tensor_parallel_size tp tp_size pipeline_parallel pipeline_parallel_size pp pp_size": (
        "leave it out: workers share the batch and the weights' shards; write cluster.workers"
    ),
    "zero_stage zero_optimization zero3 deepspeed deepspeed_config ds_config fsdp fsdp_config "
    "sharding_strategy": (
        "write zero.residency for packed codes, zero.stage for methods with latent weights"
    ),
    "offload cpu_offload offload_optimizer offload_param optimizer_offload": (
        "leave it out: nothing is moved off the device; write optimizer.states: int8, or more cluster.workers"
    ),
    "bf16 fp16 fp32 fp8 float8 tf32 dtype torch_dtype compute_dtype param_dtype model_dtype "
    "mixed_precision amp autocast": "write precision: bf16, fp32 or fp8",
    "gradient_checkpointing grad_checkpointing activation_checkpoint checkpoint_activations recompute "
    "use_checkpoint ac": "write train.activation_checkpointing",
    "random_seed manual_seed data_seed rng_seed": "write run.seed",
    "deterministic full_determinism use_deterministic_algorithms": "write train.reproducible",
    "max_restarts max_retries retries num_retries": "write cluster.max_failures",
    "torch_compile use_compile": "write train.compile: on",
    "flash_attention use_flash_attn flash_attn attn_implementation attention": (
        "leave it out: attention is PyTorch's own"
    ),
    # what is kept and shown
    "run_name exp_name job_name": "write run.name",
    "output_dir out_dir out outdir save_dir save_folder log_dir logging_dir checkpoint_dir ckpt_dir "
    "default_root_dir workdir": "write run.dir, the folder that holds the folders of runs",
    "save_steps save_interval save_freq save_strategy checkpoint_every checkpoint_interval ckpt_interval "
    "checkpoint_freq": "write train.save_every, a number of steps",
    "save_total_limit max_checkpoints keep_checkpoints num_checkpoints keep_latest_k save_top_k": (
        "write train.keep_last"
    ),
    "logging_steps log_interval log_steps log_freq print_every": "write train.log_every, a number of steps",
    "eval_steps eval_interval eval_freq evaluation_strategy eval_strategy val_every val_interval "
    "val_check_interval validation_every": "write train.eval_every, a number of steps",
    "eval_iters eval_batches max_eval_samples val_samples val_batches limit_val_batches": (
        "write train.eval_samples"
    ),
    "resume resume_from resume_from_checkpoint resume_training load_checkpoint ckpt_path auto_resume": (
        "leave it out: a run resumes from its newest checkpoint when it has the same run.name"
    ),
    "use_wandb wandb_log wandb_project wandb_entity": "write tracking.wandb, the name of a project",
    "use_tensorboard sync_tensorboard": "write tracking.tensorboard: true",
    "report_to logger loggers log_to comet": (
        "write tracking.mlflow, tracking.wandb or tracking.tensorboard; others read the run's metrics.jsonl"
    ),
    "project project_name experiment_name": "write tracking.experiment",
    "tracking_uri mlflow_tracking_uri mlflow_uri": "write tracking.mlflow",
    # the model
    "model_name model_name_or_path model_path base_model pretrained_model pretrained_model_name_or_path "
    "init_from hf_model": "write model.pretrained, the folder of a Hugging Face model",
    "n_layer n_layers num_layers num_hidden_layers depth": "write model.layers",
    "n_head n_heads num_heads num_attention_heads": "write model.heads",
    "n_kv_head n_kv_heads num_kv_heads num_key_value_heads": "write model.kv_heads",
    "d_model dim n_embd n_embed embed_dim hidden_dim model_dim width": "write model.hidden_size",
    "d_ff ffn_dim ffn_hidden_size ff_dim mlp_dim": "write model.intermediate_size",
    "max_position_embeddings n_positions n_ctx": "write model.max_seq_len",
    "tie_word_embeddings tied_embeddings weight_tying": "write model.tie_embeddings",
    "rms_norm_eps layer_norm_eps layernorm_epsilon": "write model.norm_eps",
    "rope_base": "write model.rope_theta",
    "vocab_size vocabulary_size": (
        "leave it out: it is the tokenizer's, `lowbit tokenizer train --vocab-size N`"
    ),
    "dropout attention_dropout hidden_dropout": "leave it out: nothing is dropped in training",
    "lora lora_r lora_alpha peft adapter": "leave it out: every weight is trained, none has an adapter",
    # the method
    "bits n_bits wbits w_bits weight_bits quant_bits num_bits quantization quantization_config quant_config "
    "quantize load_in_4bit load_in_8bit": "write method.grid: ternary, int2, int3, int4, int6 or int8",
    "quant_method quant_type algorithm": "write method.name",
    "act_bits a_bits abits input_bits": "write method.activation_bits",
    "group_size groupsize q_group_size": "write method.group, with method.granularity: group",
    # the data
    "dataset datasets dataset_name dataset_path data_path data_dir data_files train_file train_data "
    "train_dataset": "write data.path, the folder that `lowbit data prepare` has written",
    "tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_dir": "write data.tokenizer",
    "cache_dir": "write data.cache",
    "val_split validation_split val_fraction test_size": (
        "leave it out: it is chosen by `lowbit data prepare --val-fraction X`"
    ),
    "shuffle shuffle_seed": "leave it out: samples are shuffled, in an order that run.seed decides",
    # sections
    "training trainer training_args training_arguments": "write train",
    "ray distributed parallelism resources": "write cluster",
    "logging monitoring": "write tracking",
    "arch architecture network": "write model",
}
_ANSWER_OF = {name: answer for names, answer in _ANSWERS.items() for name in names.split()}

_VALUES = {
    "float32": "fp32", "float": "fp32", "single": "fp32", "32-true": "fp32", "f32": "fp32",
    "bfloat16": "bf16", "bf16-mixed": "bf16", "bf16-true": "bf16", "fp16": "bf16", "float16": "bf16",
    "half": "bf16", "f16": "bf16", "float8": "fp8", "e4m3": "fp8",
    "1.58bit": "ternary", "b1.58": "ternary", "1.58": "ternary", "trit": "ternary",
    "2bit": "int2", "3bit": "int3", "4bit": "int4", "8bit": "int8", "int8bit": "int8", "i8": "int8",
    "cos": "cosine", "cosine_with_min_lr": "cosine", "cosine_annealing": "cosine",
    "constant_with_warmup": "constant", "const": "constant", "warmup_stable_decay": "wsd",
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adam": "adamw",
}  # fmt: skip


def answer(name: str) -> str | None:
    """What to write instead of a field's name from elsewhere, in words."""
    return _ANSWER_OF.get(name.strip("-").lower().replace("-", "_"))


def value(word: str) -> str | None:
    """What a value from elsewhere is called here."""
    return _VALUES.get(word.lower())
