"""LLaVA-NeXT's public constants."""

IGNORE_INDEX = -100  # label of a token that is not supervised
IMAGE_TOKEN_INDEX = -200  # stands for one image (or clip) in input_ids; replaced by its visual tokens in the merge

DEFAULT_IMAGE_TOKEN = "<image>"
IMAGE_PLACEHOLDER = "<image-placeholder>"  # in a question of `llava.eval.run_llava`: where the image goes
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
TUNABLE_PARTS = ("mm_vision_tower", "mm_token_compressor", "mm_mlp_adapter", "mm_language_model")

# of LLaVA's web demo, whose parts are not here; its users' programs import them
CONTROLLER_HEART_BEAT_EXPIRATION = 30  # seconds
WORKER_HEART_BEAT_INTERVAL = 15  # seconds
LOGDIR = "."  # where `llava.utils.build_logger` writes
