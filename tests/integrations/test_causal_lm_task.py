"""Next-token prediction by chunks: the products of all logits at once, in less memory."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hesscurv

pytest.importorskip("transformers")

from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hesscurv.integrations import CausalLMTask, ModelLossTask
from hesscurv.integrations.training.chunked_loss import chunked_sum
from hesscurv.integrations.training.trainer_callback import own_loss

V = 31


class AllLogits(hesscurv.Task):
    """The same loss written down plainly."""

    def outputs(self, model, batch):
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def loss(self, outputs, batch):
        # transformers' own loss converts to float32
        return nn.functional.cross_entropy(
            outputs[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        )

    def weight(self, batch):
        return float((batch["labels"][:, 1:] != -100).sum())


def gpt2(attention="sdpa", size=V, **options):
    config = GPT2Config(
        vocab_size=size,
        n_positions=24,
        n_embd=8,
        n_layer=1,
        n_head=2,
        attn_implementation=attention,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    return GPT2LMHeadModel(config).double()


def llama(attention="sdpa", tied=False):
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).double()


def gemma2():
    """Caps its logits: the model's own code makes them of hidden states."""
    config = Gemma2Config(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        final_logit_softcapping=0.5,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config).double()


MODELS = {
    "gpt2, tied": gpt2,
    "gpt2, eager": lambda: gpt2("eager"),
    "llama": llama,
    "llama, tied, eager": lambda: llama("eager", tied=True),
    "gemma2, capped": gemma2,
}


def batch(rows, tokens, padded=0, size=V):
    """Token ids, of which the last row's end is padding."""
    ids = torch.randint(1, size, (rows, tokens))
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        mask[-1, -padded:], labels[-1, -padded:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_all_logits_at_once(name):
    model = MODELS[name]()
    batches = [batch(2, 9, padded=4), batch(1, 6)]  # of 8 + 4 and 5 tokens: not of equal weight
    plain = hesscurv.HessianOperator(model, AllLogits(), batches, way="retained")
    # Chunks that do not divide the rows.
    chunked = hesscurv.HessianOperator(model, CausalLMTask(chunk=5), batches)
    block = torch.randn(plain.shape[0], 2, dtype=torch.float64)
    expected = plain @ block
    torch.testing.assert_close(chunked @ block, expected, rtol=1e-10, atol=1e-12)
    assert float(expected.abs().max()) > 0.1


def test_vectors_at_once_and_part_of_the_parameters():
    model, batches = gpt2(), [batch(2, 9)]
    for params in ("transformer.h", ["transformer.wte.weight"]):
        plain, chunked = (
            hesscurv.HessianOperator(model, task, batches, params, way=way)
            for task, way in [(AllLogits(), "retained"), (CausalLMTask(3), "batched")]
        )
        block = torch.randn(plain.shape[0], 3, dtype=torch.float64)
        torch.testing.assert_close(chunked @ block, plain @ block, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
def test_with_gradient_checkpointing_in_training_mode():
    model, batches = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), [batch(2, 9)]
    plain = hesscurv.HessianOperator(model, AllLogits(), batches, way="retained")
    v = torch.randn(plain.shape[0], dtype=torch.float64)
    expected = plain @ v
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    chunked = hesscurv.HessianOperator(model, CausalLMTask(4), batches, training=True)
    torch.testing.assert_close(chunked @ v, expected, rtol=1e-10, atol=1e-12)
    assert model.training
    assert model.is_gradient_checkpointing


def test_the_gauss_newton_matrix_is_that_of_all_logits():
    model, batches = gpt2(), [batch(2, 7, padded=2)]
    G, expected = (
        hesscurv.GGNOperator(model, task, batches) for task in (CausalLMTask(4), AllLogits())
    )
    v = torch.randn(G.shape[0], dtype=torch.float64)
    torch.testing.assert_close(G @ v, expected @ v, rtol=1e-10, atol=1e-12)


def test_the_loss_is_the_models_own():
    model = gpt2().eval()
    data = batch(3, 8, padded=3)
    with torch.no_grad():
        loss, own = CausalLMTask(4)(model, data), model(**data).loss
    # The model's is computed in float32.
    torch.testing.assert_close(loss.float(), own.float(), rtol=1e-6, atol=0)
    assert CausalLMTask().weight(data) == ModelLossTask(shifted=True).weight(data) == 2 * 7 + 4


class PeakMemory(TorchDispatchMode):
    """Adds up the bytes of all storages that live at once, as they come and go."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._add(t.untyped_storage())
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone():
            self._known.discard(key)
            self.now -= size

        self._known.add(key)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        weakref.finalize(storage, gone)


@pytest.mark.parametrize("way", ["retained", "batched"])
def test_a_product_never_holds_all_logits(way):
    size, rows, tokens, chunk, width = 2000, 6, 24, 8, 1 if way == "retained" else 2
    model, batches = gpt2(size=size), [batch(rows, tokens, size=size)]
    logits = rows * (tokens - 1) * size * 8  # bytes of all of them, in float64
    peaks = {}
    for task in (AllLogits(), CausalLMTask(chunk)):
        H = hesscurv.HessianOperator(model, task, batches, way=way, check=False)
        block = torch.randn(H.shape[0], width, dtype=torch.float64)
        with PeakMemory() as memory:
            H @ block
        peaks[type(task)] = memory
    # Gradient and products of the embedding are 128 kB each; all logits are 2.2 MB, many times.
    assert peaks[AllLogits].peak > 4 * logits
    assert peaks[CausalLMTask].peak < peaks[AllLogits].peak / 4
    assert peaks[CausalLMTask].largest < logits / 4


def test_a_chunked_sum_has_the_derivatives_of_the_sum():
    def loss(h, y, w):
        return nn.functional.cross_entropy(torch.tanh(h @ w), y, reduction="sum")

    h = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 3, (3,))
    torch.testing.assert_close(chunked_sum(loss, h, y, 2, w), loss(h, y, w))
    assert torch.autograd.gradcheck(lambda h, w: chunked_sum(loss, h, y, 2, w), (h, w))
    # Not linear in it, so that the gradient's factor is differentiated too.
    assert torch.autograd.gradgradcheck(lambda h, w: chunked_sum(loss, h, y, 2, w).exp(), (h, w))


def bert():
    return BertConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )


def test_other_models_have_their_own_loss():
    assert isinstance(own_loss(gpt2()), CausalLMTask)
    assert isinstance(own_loss(llama()), CausalLMTask)
    model, data = BertForMaskedLM(bert()).eval(), batch(2, 6, padded=2)
    task = own_loss(model)
    assert isinstance(task, ModelLossTask)
    assert task.weight(data) == 10
    with torch.no_grad():
        assert torch.equal(task(model, data), model(**data).loss)
    # Of classes and of numbers, a sample is one.
    assert task.weight({"labels": torch.tensor([0, 1, 1])}) == 3
    assert task.weight({"labels": torch.randn(4, 2)}) == 4


def test_what_is_not_next_token_prediction_is_refused():
    data, task = batch(2, 6), CausalLMTask()
    translator = T5ForConditionalGeneration(
        T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    classifier = BertForSequenceClassification(bert())
    for model in (nn.Linear(2, 2), translator, classifier):
        with pytest.raises(TypeError, match="ModelLossTask"):
            task(model, data)
    with pytest.raises(ValueError, match="next-token"):
        task(BertForMaskedLM(bert()), data)
    own = gpt2()
    own.loss_function = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="next-token"):
        task(own, data)
    routed = gpt2()
    routed.config.output_router_logits = True
    with pytest.raises(ValueError, match="routers"):
        task(routed, data)
    prompted = gpt2()
    prompted.active_peft_config = SimpleNamespace(is_prompt_learning=True)
    with pytest.raises(ValueError, match="prompts"):
        task(prompted, data)


def test_wrong_batches_and_chunks_are_refused():
    with pytest.raises(TypeError, match="dict batches"):
        CausalLMTask()(gpt2(), (torch.zeros(1, 2), torch.zeros(1, 2)))
    with pytest.raises(ValueError, match="data collator"):
        CausalLMTask()(gpt2(), {"input_ids": torch.ones(1, 2, dtype=torch.long)})
    with pytest.raises(ValueError, match="put labels into"):
        ModelLossTask()(gpt2(), {"input_ids": torch.ones(1, 2, dtype=torch.long)})
    with pytest.raises(ValueError, match="at least 1"):
        CausalLMTask(0)
    with pytest.raises(TypeError, match="number of tokens"):
        CausalLMTask(2.5)


def test_batches_that_bring_another_denominator_are_refused():
    data = batch(2, 6)
    with pytest.raises(ValueError, match=r"'shift_labels'.*ModelLossTask"):
        CausalLMTask()(gpt2(), {**data, "shift_labels": data["labels"]})
    with pytest.raises(ValueError, match="num_items_in_batch"):
        ModelLossTask().weight({**data, "num_items_in_batch": 3})
    shifted = {**data, "shift_labels": data["labels"].roll(-1, 1)}
    shifted["shift_labels"][:, -1] = -100
    assert ModelLossTask(shifted=True).weight(shifted) == CausalLMTask().weight(data)


def test_the_fisher_weighs_sequences_by_their_tokens():
    model = gpt2().double().eval()
    batches = [batch(3, 6, padded=2), batch(2, 6)]
    batches[0]["labels"][1] = -100  # of a sequence without a label
    params = [n for n, _ in model.named_parameters() if "ln_f" in n or "attn.c_proj" in n]
    F = hesscurv.EmpiricalFisherOperator(model, CausalLMTask(), batches, params)
    chosen, expected, total = [p for n, p in model.named_parameters() if n in params], 0, 0
    for data in batches:
        for i in range(len(data["labels"])):
            row = {name: t[i : i + 1] for name, t in data.items()}
            tokens = CausalLMTask().weight(row)
            if tokens:
                logits = CausalLMTask().outputs(model, row)
                # In float64, where the task takes logits as they are.
                loss = nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), row["labels"][:, 1:].flatten()
                )
                slopes = torch.autograd.grad(loss, chosen)
                g = torch.cat([s.flatten() for s in slopes])
                expected, total = expected + tokens * torch.outer(g, g), total + tokens
    torch.testing.assert_close(F.to_dense(), expected / total, rtol=1e-9, atol=1e-13)
