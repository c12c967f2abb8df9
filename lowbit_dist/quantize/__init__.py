"""Post-training quantisation: from a trained model of full precision to one of low-bit weights.

    source = lowbit_dist.open("dense")                        a run, a checkpoint, a Hugging Face folder
    quantize(source, GPTQ(bits=4), out, calibration=Calibration(path="data/stdlib"))
    lowbit_dist.open(out).evaluate("data/stdlib")             a trained model like any other

What is written is a checkpoint (lowbit_dist/checkpoint) of method dqt, with one file for each block of the
model, and its tokenizer beside them.  So it is evaluated, generated from, inspected, and a run starts from
it; weights, but those of linear layers except the head, are as they were.

One block is in memory at a time.  A finished block is on the disk: the same command takes up the work of a
killed one, and gives the same bytes.
"""

from lowbit_dist.quantize.calibration import Calibration
from lowbit_dist.quantize.gptq import GPTQ
from lowbit_dist.quantize.ptqtp import PTQTP
from lowbit_dist.quantize.quantizer import Quantizer
from lowbit_dist.quantize.rtn import RTN
from lowbit_dist.quantize.work import QUANTIZERS, quantize, quantizer

__all__ = ["GPTQ", "PTQTP", "QUANTIZERS", "RTN", "Calibration", "Quantizer", "quantize", "quantizer"]
