"""The methods: each a short file that reads like its paper.

``RECIPES`` maps the names that the command line knows to classes (``module:class``, imported on demand, so that the
names are known without torch); every class in it is ``fs.<Class>`` too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fewstep.methods.method import Recipe

RECIPES: dict[str, str] = {
    "denoising": "fewstep.methods.teachers.denoising:Denoising",
    "flow-matching": "fewstep.methods.teachers.denoising:FlowMatchingTraining",
    "discrete-denoising": "fewstep.methods.teachers.discrete_denoising:DiscreteDenoising",
    "score-entropy": "fewstep.methods.teachers.discrete_denoising:ScoreEntropy",
    "analog-bits": "fewstep.methods.teachers.analog_bits:AnalogBits",
    "lowdiff": "fewstep.methods.teachers.lowdiff:LowDiff",
    "retime": "fewstep.methods.teachers.retime:Retime",
    "lsd": "fewstep.methods.samplers.lsd:LSD",
    "lsd-plus": "fewstep.methods.samplers.lsd:LSDPlus",
    "cm": "fewstep.methods.consistency.cm:ConsistencyDistillation",
    "cm-training": "fewstep.methods.consistency.cm:ConsistencyTraining",
    "ict": "fewstep.methods.consistency.ict:ImprovedConsistencyTraining",
    "scm": "fewstep.methods.consistency.scm:ContinuousConsistencyDistillation",
    "scm-training": "fewstep.methods.consistency.scm:ContinuousConsistencyTraining",
    "rcm": "fewstep.methods.consistency.rcm:RCM",
    "tbcm": "fewstep.methods.consistency.tbcm:TBCM",
    "mlcm": "fewstep.methods.consistency.mlcm:MLCM",
    "sana-sprint": "fewstep.methods.consistency.sana_sprint:SanaSprint",
    "ctm": "fewstep.methods.consistency.ctm:ConsistencyTrajectory",
    "ctm-training": "fewstep.methods.consistency.ctm:SelfConsistencyTrajectory",
    "lcm": "fewstep.methods.consistency.lcm:LatentConsistencyDistillation",
    "scott": "fewstep.methods.consistency.scott:StochasticConsistencyDistillation",
    "tscd": "fewstep.methods.consistency.tscd:SegmentedConsistency",
    "hyper-sd": "fewstep.methods.consistency.hyper_sd:HyperSD",
    "pcm": "fewstep.methods.consistency.pcm:PhasedConsistencyDistillation",
    "dmd": "fewstep.methods.matching.dmd:DMD",
    "dmd2": "fewstep.methods.matching.dmd2:DMD2",
    "swift-brush": "fewstep.methods.matching.swift_brush:SwiftBrush",
    "dmd2-stages": "fewstep.methods.matching.dmd2_stages:DMD2Stages",
    "f-distill": "fewstep.methods.matching.f_distill:FDistill",
    "phased-dmd": "fewstep.methods.matching.phased_dmd:PhasedDMD",
    "tdm": "fewstep.methods.matching.tdm:TDM",
    "ladd": "fewstep.methods.matching.ladd:LADD",
    "diff-instruct": "fewstep.methods.matching.diff_instruct:DiffInstruct",
    "sid": "fewstep.methods.matching.sid:SiD",
    "sim": "fewstep.methods.matching.sim:SIM",
    "disback": "fewstep.methods.matching.disback:DisBack",
    "msd": "fewstep.methods.matching.msd:MSD",
    "boot": "fewstep.methods.flow_maps.boot:BOOT",
    "free-flow": "fewstep.methods.flow_maps.free_flow:FreeFlow",
    "reflow": "fewstep.methods.flow_maps.rectified_flow:Reflow",
    "instaflow": "fewstep.methods.flow_maps.rectified_flow:InstaFlow",
    "mdt-dist": "fewstep.methods.flow_maps.mdt_dist:MDTDist",
    "mean-flow": "fewstep.methods.flow_maps.mean_flow:MeanFlowDistillation",
    "mean-flow-training": "fewstep.methods.flow_maps.mean_flow:MeanFlowTraining",
    "ayf": "fewstep.methods.flow_maps.align_your_flow:AlignYourFlow",
    "ayf-lmd": "fewstep.methods.flow_maps.align_your_flow:LagrangianAlignYourFlow",
    "caf": "fewstep.methods.flow_maps.constant_acceleration:ConstantAccelerationFlow",
    "slim-flow": "fewstep.methods.flow_maps.slim_flow:SlimFlow",
    "pd": "fewstep.methods.flow_maps.progressive:ProgressiveLadder",
    "pd-halving": "fewstep.methods.flow_maps.progressive:ProgressiveDistillation",
    "guided-distillation": "fewstep.methods.flow_maps.guided_distillation:GuidedDistillation",
    "shortcut": "fewstep.methods.flow_maps.shortcut:Shortcut",
    "supervised": "fewstep.condense.supervised:Supervised",
    "soft-supervised": "fewstep.condense.supervised:SoftSupervised",
    "kd": "fewstep.condense.supervised:KnowledgeDistillation",
    "pca": "fewstep.condense.pca:PCA",
    "dq": "fewstep.condense.dq:DatasetQuantization",
    "ast": "fewstep.condense.ast:AST",
    "cv-dd": "fewstep.condense.cv_dd:CVDD",
    "rad": "fewstep.condense.rad:RAD",
    "diswot": "fewstep.students.diswot:DisWOT",
    "language-modelling": "fewstep.language.modelling:LanguageModelling",
    "distill-spec": "fewstep.language.distill_spec:DistillSpec",
    "distill-spec-garden": "fewstep.language.distill_spec:DistillSpecGarden",
    "sft": "fewstep.language.redi:FineTuning",
    "redi": "fewstep.language.redi:REDI",
}


def recipe_class(name: str) -> type[Recipe]:
    """The class behind a name; ValueError naming the choices when there is none."""
    if name not in RECIPES:
        raise ValueError(f"method '{name}' is unknown; choose from {', '.join(RECIPES)}")
    module, _, attribute = RECIPES[name].partition(":")
    return getattr(import_module(module), attribute)


#: Methods that make a small data set of a large one.
CONDENSERS: tuple[str, ...] = ("pca", "dq", "ast", "cv-dd")

__all__ = ["CONDENSERS", "RECIPES", "recipe_class"]
