"""The scheduler: no step cuts a block, no page of a response serves other requests, a full model ends a request."""

import hashlib
from typing import Any

from vllm.v1.core.sched.diffusion_scheduler import DiffusionScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from .pieces import whole_blocks
from .startup import check_pages


class BlockScheduler(DiffusionScheduler):
    """vLLM's scheduler for diffusion, with the blocks of Bard-VL.

    vLLM calls a block that is denoised speculative tokens: those of a step that finishes no block are all rejected. A
    finished block comes out and counts as not computed, so that the next step runs [finished block, empty block], which
    encodes the one and denoises the other; a step of its own for encoding is never needed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.vllm_config
        if not config.use_v2_model_runner:
            raise ValueError("Bard-VL on vLLM needs its model runner V2 (VLLM_USE_V2_MODEL_RUNNER=1, and Triton)")
        if self.scheduler_config.async_scheduling:
            raise ValueError(
                "Bard-VL on vLLM does not go with --async-scheduling: a block is encoded with the next one"
            )
        self.canvas, self.mask_token_id = self.num_spec_tokens, config.model_config.hf_config.mask_token_id
        self.refused: list[Request] = []
        check_pages(self.canvas, self.block_size, kwargs.get("hash_block_size") or self.block_size)
        # A block may hold the end of a picture and the beginning of the next: both are there, or it cannot be computed.
        pictures = self.encoder_cache_manager
        self.max_num_encoder_input_tokens = 2 * pictures.cache_size + self.canvas
        added = 2 * self.max_num_encoder_input_tokens - pictures.cache_size
        pictures.cache_size += added
        pictures.num_free_slots += added
        pictures.num_freeable_slots += added

    def add_request(self, request: Request) -> None:
        """Take a request, with the hashes of its later pages made its own.

        A response's blocks begin where its prompt ended: in another prompt the same tokens are cut elsewhere.
        """
        hasher, num_shared = request._block_hasher, len(request.block_hashes)

        def own(later: Request) -> list[Any]:
            hashes = hasher(later) if hasher is not None else []
            if len(later.block_hashes) == num_shared and hashes:  # all that follow chain on this one
                salted = hashlib.sha256(hashes[0] + later.request_id.encode()).digest()
                hashes = [type(hashes[0])(salted)]
            return hashes

        if hasher is not None:
            request._block_hasher = own
        super().add_request(request)
        # Prompts that come in parts, and what no prompt may hold; texts never do.
        if request.resumable or self.mask_token_id in (request.prompt_token_ids or ()):
            self.refused.append(request)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Tokens that a step takes of a request: those asked for, or as many as end with a block."""
        wanted = request.num_tokens_with_spec - num_computed_tokens
        if num_new_tokens >= wanted:
            return num_new_tokens
        if request.spec_token_ids:  # a block that does not fit into this step waits for the next
            return 0
        return whole_blocks(num_computed_tokens, num_new_tokens, request.num_prompt_tokens, self.canvas)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        """Take a finished block over, whose keys and values the next step encodes."""
        new_token_ids, stopped = super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
        if not stopped:
            request.num_computed_tokens -= len(new_token_ids)
        return new_token_ids, stopped

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """End requests that can take no further block, too."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in [*self.running, *self.refused]:
            if request in self.refused:
                self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
            elif request.num_tokens + self.canvas > self.max_model_len:
                self.finish_requests(request.request_id, RequestStatus.FINISHED_LENGTH_CAPPED)
            else:
                continue
            ended = EngineCoreOutput(request.request_id, [], finish_reason=request.get_finished_reason())
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(ended)
        self.refused.clear()
        return outputs
