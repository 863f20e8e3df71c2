"""Bard-VL in vLLM's model runner: Qwen3-VL with attention by pieces, and a sampler that denoises blocks."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.states import RequestState

from .denoising import Blocks
from .pieces import Pieces, cut
from .settings import request_settings


class BardVLMultiModalProcessor(Qwen3VLMultiModalProcessor):
    """Qwen3-VL's, with the prompt around a video that the checkpoints were trained with."""

    @staticmethod
    def _expands_only_video_token(hf_processor: Any) -> bool:
        """Whether the marks around a video stay in the prompt: they do not; every frame has its own."""
        return False


@MULTIMODAL_REGISTRY.register_processor(
    BardVLMultiModalProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class BardVLForConditionalGeneration(Qwen3VLForConditionalGeneration):
    """Qwen3-VL's layers and weights; the state of its requests is ours."""

    @staticmethod
    def get_model_state_cls() -> type["BardVLModelState"]:
        """The class that vLLM asks about this model's requests."""
        return BardVLModelState

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits (n, vocabulary) of hidden states (n, hidden); n is 0 in a step of prompts alone.

        There the gathering of tensor parallelism on a CPU would divide by n.
        """
        if not hidden_states.shape[0]:
            return hidden_states.new_empty(0, self.config.text_config.vocab_size)
        return super().compute_logits(hidden_states)


class BardVLModelState(DefaultModelState):
    """Requests whose responses are denoised block by block."""

    num_new_sampled_tokens_per_step = 0  # a step may yield nothing
    supports_prompt_embeds = False

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device):
        super().__init__(vllm_config, model, encoder_cache, device)
        size, config = vllm_config.diffusion_config.canvas_length, self.model_config.hf_config
        self.blocks = Blocks(self.max_num_reqs, size, config.mask_token_id, device)
        self.prompt_lengths = np.zeros(self.max_num_reqs, dtype=np.int64)
        self.num_given = np.zeros(self.max_num_reqs, dtype=np.int64)  # tokens that a request came with

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """Ours, and none for speculation."""
        return BlockSampler(sampler, self), None

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Note where the response of a request begins."""
        super().add_request(req_index, new_req_data)
        self.prompt_lengths[req_index] = new_req_data.prompt_len
        self.num_given[req_index] = len(new_req_data.prefill_token_ids or ())

    def prepare_inputs_embeds(
        self, scheduled_encoder_inputs: dict[str, list[int]], input_batch: InputBatch, req_states: RequestState
    ) -> torch.Tensor:
        """Embed the step's tokens."""
        self._show_finished(input_batch, req_states)
        return super().prepare_inputs_embeds(scheduled_encoder_inputs, input_batch, req_states)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, torch.Tensor | None]:
        """Positions of the step's tokens."""
        if not self.supports_mm_inputs:
            self._show_finished(input_batch, req_states)
        return super().prepare_inputs(input_batch, req_states)

    def _show_finished(self, input_batch: InputBatch, req_states: RequestState) -> None:
        """Write finished blocks in front of the empty ones: vLLM knows prompts and speculative tokens alone."""
        num_requests, size = input_batch.num_reqs, self.blocks.size
        drafts = np.diff(input_batch.cu_num_logits_np[: num_requests + 1])
        rows = np.flatnonzero((drafts > 0) & (input_batch.num_scheduled_tokens[:num_requests] > drafts))
        if not len(rows):
            return
        place = np.arange(size)
        where = input_batch.query_start_loc_np[rows][:, None] + place
        column = input_batch.num_computed_tokens_np[rows][:, None] + place
        table = np.stack([where, np.broadcast_to(input_batch.idx_mapping_np[rows][:, None], where.shape), column])
        index, slot, position = torch.from_numpy(table.astype(np.int64)).to(self.device)
        input_batch.input_ids[index] = req_states.all_token_ids.gpu[slot, position]

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
        model_specific_attn_metadata: Any = None,
    ) -> dict[str, Any]:
        """Hand every block of a request to attention as a request of its own, which sees all its keys."""
        is_recorded = cudagraph_mode == CUDAGraphMode.FULL
        n = input_batch.num_reqs_after_padding if is_recorded else input_batch.num_reqs
        bounds, starts = input_batch.query_start_loc_np[: n + 1], input_batch.query_start_loc[: n + 1]
        ends, longest = input_batch.seq_lens[:n], int(input_batch.num_scheduled_tokens.max())
        if not for_capture and (input_batch.has_prefill or longest > self.blocks.size):
            if is_recorded:
                raise RuntimeError("a recorded step of single blocks was chosen for a step that has others")
            pieces, block_tables = self._pieces(input_batch, block_tables)
            n, bounds, longest = len(pieces.rows), pieces.bounds, int(np.diff(pieces.bounds).max())
            starts, ends = (torch.from_numpy(each).to(self.device) for each in (bounds, pieces.ends))
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=n,
            num_tokens=input_batch.num_tokens_after_padding if is_recorded else input_batch.num_tokens,
            query_start_loc_gpu=starts,
            query_start_loc_cpu=torch.from_numpy(bounds),
            max_query_len=longest,
            seq_lens=ends,
            max_seq_len=self.max_model_len,
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            for_cudagraph_capture=for_capture,
            causal=False,
        )

    def _pieces(
        self, batch: InputBatch, block_tables: tuple[torch.Tensor, ...]
    ) -> tuple[Pieces, tuple[torch.Tensor, ...]]:
        """The blocks of a step, and of each the pages of its request."""
        n = batch.num_reqs
        lengths = self.prompt_lengths[batch.idx_mapping_np[:n]]
        pieces = cut(batch.num_computed_tokens_np[:n], batch.num_scheduled_tokens[:n], lengths, self.blocks.size)
        rows = torch.from_numpy(pieces.rows).to(self.device)
        return pieces, tuple(table[rows] for table in block_tables)


class BlockSampler:
    """vLLM's sampler interface around the package's denoising."""

    penalties_state = SimpleNamespace(output_bin_counts=None)  # which vLLM reads of every sampler

    def __init__(self, sampler: Any, state: BardVLModelState):
        self.state, self.blocks = state, state.blocks
        self.req_states, self.sampling_states = sampler.req_states, sampler.sampling_states
        self.sampled = torch.zeros(state.max_num_reqs, self.blocks.size, dtype=torch.int32, device=state.device)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Begin the first block of a request, or the next of one that was preempted."""
        self.sampling_states.add_request(req_idx, sampling_params)
        settings = request_settings(sampling_params, self.state.model_config.hf_config)
        # vLLM's own seeds are those of the requests, or drawn alike in all processes. What was preempted draws anew.
        given = int(self.state.num_given[req_idx] - self.state.prompt_lengths[req_idx])
        self.blocks.begin(req_idx, settings, int(self.sampling_states.seeds.np[req_idx]) + given)
        self.req_states.draft_tokens[req_idx] = self.blocks.mask_token_id

    def apply_staged_writes(self) -> None:
        """Nothing is staged here."""

    def __call__(self, logits: torch.Tensor, input_batch: InputBatch, draft_logits: Any = None) -> SamplerOutput:
        """Denoise the blocks of a step; those that are finished come out."""
        num_requests = input_batch.num_reqs
        drafts = np.diff(input_batch.cu_num_logits_np[: num_requests + 1])
        sampled = self.sampled[:num_requests].zero_()
        num_sampled = torch.zeros(num_requests, dtype=torch.int32, device=self.state.device)
        rows = np.flatnonzero(drafts)
        if input_batch.num_draft_tokens and len(rows):
            slots = input_batch.idx_mapping_np[rows]
            ids, finished = self.blocks.advance(slots, logits.unflatten(0, (len(rows), self.blocks.size)))
            index, own = (torch.from_numpy(each.astype(np.int64)).to(self.state.device) for each in (rows, slots))
            sampled[index] = ids.to(sampled.dtype)
            num_sampled[index] = finished.to(num_sampled.dtype) * self.blocks.size
            self.req_states.draft_tokens[own] = self.blocks.ids[own].to(self.req_states.draft_tokens.dtype)
        # The block that is denoised counts as not computed, also one that came out: it is encoded with the next.
        rejected = torch.from_numpy(drafts.astype(np.int32) * bool(input_batch.num_draft_tokens)).to(self.state.device)
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=rejected,
        )
