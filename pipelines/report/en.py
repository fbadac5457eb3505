"""Reads nothing, writes nothing: the texts of the report and of the gate's rules in English, by key."""

from __future__ import annotations

TEXTS = {
    "title": "{recipe}: {verdict}",
    "verdict_promote": "promote",
    "verdict_keep_cfg": "keep CFG",
    "verdict_keep_champion": "keep the champion",
    "verdict_awaiting_votes": "awaiting votes",
    "verdict_go": "go",
    "verdict_no_go": "no-go",
    # The verdict, for whoever decides.
    "do_promote": "Serve the aligned model.",
    "do_keep_cfg": "Keep serving {guided}.",
    "do_keep_champion": "Keep serving the present champion.",
    "do_awaiting_votes": "Let people look first: {votes} of {min_votes} votes are in.",
    "do_go": "Start the full run.",
    "do_no_go": "Do not start the full run yet.",
    "why_promote": "It needs {aligned_calls} model calls per image instead of {guided_calls} and {whole} end to end "
    "({tokens} counting the tokens alone) against {guided}. Its {distance} is {aligned} against {best}, and it "
    "passed all {rules} rules of the gate.",
    "why_keep": "The aligned model needs {aligned_calls} model calls per image instead of {guided_calls} and {whole} "
    "end to end ({tokens} counting the tokens alone) against {guided}. But its {distance} is {aligned} against "
    "{best}, and it failed {failed} of {rules} rules of the gate: {names}.",
    "why_awaiting_votes": "The aligned model needs {aligned_calls} model calls per image instead of {guided_calls} "
    "and {whole} end to end ({tokens} counting the tokens alone) against {guided}. Its {distance} is {aligned} "
    "against {best}, and it passed every other rule. Nothing is registered until the votes are in.",
    "why_go": "On {share} of the images the aligned model needs {aligned_calls} model calls per image instead of "
    "{guided_calls} and {whole} end to end ({tokens} counting the tokens alone) against {guided}. Its {distance} is "
    "{aligned} against {best}, and it passed all {rules} rules of the gate. A pilot registers nothing.",
    "saves": "saves {share} of the time and cost of an image",
    "saves_more": "as measured here takes {share} more time and cost for an image",
    "saves_short": "{share} saved",
    "saves_more_short": "{share} more",
    "fact_calls": "Model calls per image",
    "fact_calls_value": "{aligned} instead of {guided}",
    "fact_calls_note": "With guidance ({guided_label}) the network runs twice where the aligned model runs once.",
    "fact_whole": "Time and cost end to end",
    "fact_tokens": "The same, tokens only",
    "fact_cost_note": "1,000 images: {aligned_time} instead of {guided_time}; {aligned} instead of {guided} {unit}.",
    "fact_quality": "Quality: {distance}",
    "fact_quality_value": "{aligned} against {guided}",
    "fact_quality_note": "of {guided_label}; {base} of the base without guidance. Lower is better.",
    "fact_safety": "Safety",
    "fact_safety_value": "{passed} of {checks} checks passed",
    "fact_safety_good": "Variety, repetition, memorisation, and unequal or mixed-up classes.",
    "fact_safety_none": "not checked",
    "fact_people": "Did people look?",
    "fact_people_none": "Nobody was asked",
    "fact_people_none_note": "The recipe asks for no votes (decide.min_votes is 0).",
    "fact_people_waiting": "{votes} of {min_votes} votes",
    "fact_people_value": "win rate {rate}",
    "fact_people_note": "{votes} votes of {reviewers} reviewers, 95 % interval {low} to {high}; 0.5 is as good as "
    "the best CFG.",
    "unit_money": "(at the price of the recipe)",
    "unit_device-hours": "device-hours",
    # A pilot, and the full run.
    "fact_full": "The full run",
    "fact_full_unknown": "unknown",
    "fact_pilot": "Pilot",
    "fact_pilot_value": "go",
    "fact_pilot_note": "It expected {time} for this run, whose stages took {took}.",
    "section_full": "What the full run will take",
    "section_pilot": "The pilot",
    "pilot_passed": "This run started from the passed pilot {run} (MLflow run) of the same recipe and source.",
    "full_text": "The pilot had {images} of the images and drew {samples} of the samples. Times grow in proportion: "
    "those of training and of cached data with the images, those of evaluation with the samples, safety with both; "
    "what is imported stays. Start-up is counted as if it grew too, so that the total is rather too high.",
    "full_unknown": "It cannot be told: a stage was adopted from storage, without the run that timed it.",
    "full_hours": "About {hours} device-hours; set cost.price_per_device_hour for money.",
    "full_money": "About {hours} device-hours, which cost {cost} at the price of the recipe.",
    "full_advice": "With more images the base, the tokenizer and the feature network see more, so that distances fall; "
    "what should carry over is how the samplers compare.",
    "full_start": "Start it with --profile full.",
    "all_stages": "all, one after another",
    "column_stage": "stage",
    "column_pilot": "pilot",
    "column_full": "full run",
    "column_devices": "devices",
    # Quality against cost.
    "section_quality_cost": "Quality against cost",
    "quality_cost_text": "Every sampler that was measured. The aligned model should stand where the guided ones do "
    "in quality, and left of them in cost.",
    "picture_quality_cost": "Distance (lower is better) and class consistency (higher is better) against the cost of "
    "1,000 images end to end. T is the temperature.",
    "picture_fidelity_diversity": "Fidelity against diversity: class consistency and distance over recall.",
    "interval": "{low} to {high}",
    # The evaluation.
    "section_evaluation": "Evaluation",
    "evaluation_text": "Mean, and below it the 95 % interval of the mean.",
    "column_sampler": "sampler",
    "metric_distance": "distance",
    "metric_spatial_distance": "spatial distance",
    "metric_inception_score": "IS",
    "metric_precision": "precision",
    "metric_recall": "recall",
    "metric_density": "density",
    "metric_coverage": "coverage",
    "metric_class_consistency": "class consistency",
    "column_calls": "calls/image",
    "column_speed": "images/s",
    "column_joules": "joules/image",
    "column_cost_money": "cost of 1,000",
    "column_cost_device-hours": "device-hours for 1,000",
    # The gate.
    "section_gate": "The gate",
    "column_rule": "rule",
    "column_value": "value",
    "column_limit": "limit",
    "column_passed": "passed",
    "column_remedy": "what to try",
    "at_least": "at least {limit}",
    "at_most": "at most {limit}",
    "yes": "yes",
    "no": "no",
    "left_out_no_recall": "No rule about diversity: the published real statistics come without images, so there is "
    "no recall. A model that lost diversity would pass; look at the samples, or give real images",
    # What it costs.
    "section_costs": "What it costs",
    "costs_money": "In the currency of cost.price_per_device_hour, at {price} per device-hour.",
    "costs_device-hours": "In device-hours; set cost.price_per_device_hour for money.",
    "column_1000": "1,000 images",
    "column_aligned": "aligned",
    "column_saved": "saved",
    "row_end_to_end": "end to end, with image decoding",
    "row_tokens": "tokens only",
    "alignment_unknown": "What the alignment took is not known: its stages were adopted from storage, without their "
    "run.",
    "alignment_took": "The alignment took {hours} device-hours (cached reference and training).",
    "alignment_money": "At that price it cost {cost}.",
    "break_even": "It has paid for itself after {images} images, end to end.",
    "break_even_never": "The aligned model is not faster here, so that it never pays for itself.",
    "column_monthly": "images per month, for {months} months",
    "column_aligned_total": "aligned, with its alignment",
    # Safety.
    "section_safety": "Safety",
    "column_within_class_diversity": "variety of the least varied class",
    "column_twins": "nearly equal samples",
    "column_memorisation": "memorisation",
    "column_class_disparity": "worst class below the mean",
    "column_leakage": "classes most mixed up",
    "column_filtered": "blocked by the content filter",
    "column_filtered_in_class": "blocked, worst class",
    "taken_as": "{drawn} as {taken}",
    "safety_text": "The aligned model beside the base and its best CFG, all measured on the same number of samples.",
    "section_worst": "Worst cases of the aligned model",
    "picture_copies.png": "Rows from above: samples nearest to a training image for how far they are from any "
    "held-out one; that training image; the nearest held-out image.",
    "picture_twins.png": "Rows from above: the samples that are most alike; the other one of each pair.",
    "picture_least_varied.png": "Rows from above: samples of the class with the least variety for its real images; "
    "real images of it.",
    "picture_worst_class.png": "The class with the lowest class consistency: samples that are taken for another "
    "class first.",
    "picture_filtered.png": "Rows from above: samples with the highest scores of the content filter; those of the "
    "class that it blocks most.",
    # Votes.
    "section_votes": "People",
    "votes_text": "{votes} votes of {reviewers} reviewers on {pairs} pairs of images, blind: the win rate of the "
    "aligned model against {guided} is {rate}, 95 % Wilson interval {low} to {high}.",
    "votes_agreement": "Reviewers chose the same in {share} of {compared} comparisons; Cohen's kappa is {kappa}.",
    "votes_no_agreement": "No two reviewers voted on the same pair, so that nothing tells how far they agree.",
    "column_class": "class",
    "column_wins": "aligned is better",
    "column_losses": "guided is better",
    "column_equal": "equal",
    "column_rate": "win rate",
    "all_classes": "all",
    # The sweep.
    "section_sweep": "The sweep",
    "sweep_text": "The candidate has the settings of rank {rank}: {label}.",
    "column_rank": "rank",
    "column_settings": "settings",
    "own_settings": "{label} (the recipe's own)",
    "column_guided_distance": "distance with CFG",
    # Samples.
    "section_samples": "Samples",
    "picture_samples": "Same classes and seeds, one sampler below the other; above them real images, and the same "
    "images encoded and decoded.",
    # Lineage.
    "section_lineage": "Lineage",
    "column_what": "what",
    "lineage_source": "source",
    "lineage_tokens": "tokens",
    "lineage_stage": "digest of {stage}",
    "lineage_version": "model version ({role})",
    "lineage_run": "MLflow run",
    "lineage_recipe": "recipe",
    "lineage_package": "package",
    "embedded_digits": "the embedded digits (scikit-learn)",
    # How it was measured.
    "section_measured": "How it was measured",
    "measured_samples": "{samples} samples per sampler and seed, sampling seeds {seeds}; values are means over the "
    "seeds.",
    "measured_real": "{count} real images ({real}).",
    "measured_statistics": "Published statistics of real images ({real}).",
    "real_published": "published: {name}",
    "real_images": "the set evaluate.real={real}",
    "real_codes": "the set evaluate.real={real}, reconstructions from recorded codes",
    "measured_embedded": "The distance is a Frechet distance in the features of the embedded classifier: it compares "
    "samplers of this run and is not FID.",
    "measured_file": "The distance is a Frechet distance in the features of {name} (sha256 {sha256}): it compares "
    "samplers measured with that network and is not FID.",
    "measured_fid": "The distance is FID: the feature network is {name} (sha256 {sha256}).",
    "measured_intervals": "The 95 % intervals are of a bootstrap over blocks of images: samples are drawn again for "
    "all but recall and coverage, for which real images are. They tell how far a number moves with that draw, and "
    "say nothing of the bias of a distance at this number of samples.",
    "measured_cost": "Speeds are of one device, {images} images per sampler at batch size {batch}, the median of "
    "three. Base, best CFG and aligned model were timed in one run, the other samplers in a run of their own.",
    # How to reproduce.
    "section_reproduce": "How to reproduce",
    "reproduce_text": "The recipe with every value stated is an artifact of the MLflow run (recipe.yaml). With the "
    "same storage, source and checkpoints this finds every stage finished; elsewhere it computes them again:",
    "note_rest": "The rest is in report.html and report.md, among the artifacts.",
    "reproduce_recipe": "The resolved recipe (recipe.yaml)",
    # Rules of the gate, and what to try where one fails.
    "rule_distance_vs_base": "distance over that of the base without guidance",
    "remedy_distance_vs_base": "raise align.epochs or align.lambda_, or train the base longer",
    "rule_distance_vs_best_cfg": "distance over that of {guided}",
    "remedy_distance_vs_best_cfg": "try align.beta and align.lambda_ from 0.3 to 10",
    "rule_class_drop": "class consistency lost by the worst class",
    "remedy_class_drop": "look at the images of that class: wrong labels or too few of them",
    "rule_recall_share": "recall over that of {guided}",
    "remedy_recall_share": "lower align.lambda_ or align.epochs: the model has lost diversity",
    "rule_beat_temperature": "class consistency above that of a base temperature of the same recall",
    "remedy_beat_temperature": "a lower temperature alone does as well: raise align.lambda_ or align.epochs",
    "rule_distance_vs_champion": "distance over that of the present champion",
    "remedy_distance_vs_champion": "the champion is better: keep it",
    "rule_win_rate": "win rate among people ({votes} votes, 95 % interval {low:.3f} to {high:.3f})",
    "remedy_win_rate": "people prefer guidance: look at the classes that lose, raise align.lambda_ or align.epochs",
    "rule_safety_variety": "variety of {class_name}, the least varied class, over that of its real images",
    "remedy_safety_variety": "the model has collapsed to a few images of it: lower align.lambda_, align.epochs or "
    "align.optim.lr",
    "rule_safety_twins": "share of samples that are nearly the same as another one",
    "remedy_safety_twins": "the model repeats itself: lower align.lambda_ or align.epochs",
    "rule_safety_memorisation": "memorisation: training images nearest to samples more often than held-out ones, 0 "
    "is chance",
    "remedy_safety_memorisation": "the model copies training images (copies.png): train on more images, or for fewer "
    "epochs",
    "rule_safety_disparity": "class consistency of {class_name}, the worst class, below the mean",
    "remedy_safety_disparity": "look at the images of that class (worst_class.png): wrong labels or too few of them",
    "rule_safety_filter": "share of the samples of {class_name} that the content filter blocks, the most of all "
    "classes",
    "remedy_safety_filter": "look at what it blocks (filtered.png): remove such images of that class from the source, "
    "or, where it is wrong, raise safety.filter_threshold",
    "rule_safety_leakage": "share of {drawn} taken for {taken}, the classes most mixed up",
    "remedy_safety_leakage": "look for images of one under the label of the other; raise align.lambda_ if only the "
    "alignment is weak",
}
