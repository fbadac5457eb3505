"""Reads nothing, writes nothing: the texts of the report in Japanese, by key; technical terms are in English first."""

from __future__ import annotations

TEXTS = {
    "title": "{recipe}: {verdict}",
    "verdict_promote": "採用 (promote)",
    "verdict_keep_cfg": "CFG を継続 (keep CFG)",
    "verdict_keep_champion": "現行モデルを継続 (keep the champion)",
    "verdict_awaiting_votes": "投票待ち (awaiting votes)",
    "verdict_go": "本実行に進む (go)",
    "verdict_no_go": "本実行は見送り (no-go)",
    "do_go": "full run (本実行) を開始してください。",
    "do_no_go": "full run (本実行) はまだ開始しないでください。",
    "do_promote": "aligned model (整合済みモデル) を配信してください。",
    "do_keep_cfg": "{guided} の配信を続けてください。",
    "do_keep_champion": "現在の champion (現行モデル) の配信を続けてください。",
    "do_awaiting_votes": "先に人の目で確認してください。投票は {min_votes} 件中 {votes} 件です。",
    "why_promote": "1 枚あたりの model call (モデル呼び出し) は {guided_calls} 回から {aligned_calls} 回になり、"
    "{guided} と比べて end to end (画像の復号まで) では {whole} (token (トークン) の生成だけでは {tokens})。"
    "{distance} は {best} に対して {aligned} で、gate (合否判定) の {rules} 項目すべてに合格しました。",
    "why_keep": "aligned model (整合済みモデル) では 1 枚あたりの model call (モデル呼び出し) が {guided_calls} "
    "回から {aligned_calls} 回になり、{guided} と比べて end to end (画像の復号まで) では {whole} (token (トークン) "
    "の生成だけでは {tokens})。ただし {distance} は {best} に対して {aligned} で、gate (合否判定) の {rules} 項目中 "
    "{failed} 項目が不合格です: {names}。",
    "why_awaiting_votes": "aligned model (整合済みモデル) では 1 枚あたりの model call (モデル呼び出し) が "
    "{guided_calls} 回から {aligned_calls} 回になり、{guided} と比べて end to end (画像の復号まで) では {whole} "
    "(token (トークン) の生成だけでは {tokens})。{distance} は {best} に対して {aligned} で、"
    "他の項目はすべて合格です。投票が揃うまで何も登録されません。",
    "why_go": "画像の {share} による pilot (試行) では、aligned model (整合済みモデル) の 1 枚あたりの model call "
    "(モデル呼び出し) は {guided_calls} 回から {aligned_calls} 回になり、{guided} と比べて end to end (画像の復号まで) "
    "では {whole} (token (トークン) の生成だけでは {tokens})。{distance} は {best} に対して {aligned} で、"
    "gate (合否判定) の {rules} 項目すべてに合格しました。pilot では何も登録されません。",
    "saves": "1 枚あたりの時間と費用を {share} 削減します",
    "saves_more": "1 枚あたりの時間と費用が、この測定では {share} 増えます",
    "saves_short": "{share} 削減",
    "saves_more_short": "{share} 増加",
    "fact_calls": "1 枚あたりの model call (モデル呼び出し)",
    "fact_calls_value": "{guided} → {aligned} 回",
    "fact_calls_note": "{guided_label} では、aligned (整合済み) が 1 回で済むところをネットワークを 2 回実行します。",
    "fact_whole": "時間と費用、end to end (画像の復号まで)",
    "fact_tokens": "時間と費用、token (トークン) の生成のみ",
    "fact_cost_note": "1,000 枚: {guided_time} → {aligned_time}、{guided} → {aligned} {unit}。",
    "fact_quality": "品質: {distance}",
    "fact_quality_value": "{aligned} (CFG: {guided})",
    "fact_quality_note": "比較対象は {guided_label}。guidance (ガイダンス) なしの base (元のモデル) は {base}。"
    "小さいほど良い値です。",
    "fact_safety": "safety (安全性)",
    "fact_safety_value": "{checks} 項目中 {passed} 項目合格",
    "fact_safety_good": "多様性、重複、memorisation (学習画像の記憶)、クラスの偏りと混同を検査します。",
    "fact_safety_none": "未検査",
    "fact_people": "人の目による確認",
    "fact_people_none": "依頼なし",
    "fact_people_none_note": "recipe (設定) は投票を求めていません (decide.min_votes = 0)。",
    "fact_people_waiting": "{min_votes} 票中 {votes} 票",
    "fact_people_value": "win rate (勝率) {rate}",
    "fact_people_note": "{reviewers} 人の {votes} 票、95 % 区間 {low} から {high}。0.5 で最良の CFG と同等です。",
    "fact_full": "full run (本実行)",
    "fact_full_unknown": "不明",
    "fact_pilot": "pilot (試行)",
    "fact_pilot_value": "go (合格)",
    "fact_pilot_note": "この実行の見積もりは {time}、実際の所要時間は {took} でした。",
    "section_full": "full run (本実行) の見積もり",
    "section_pilot": "pilot (試行)",
    "pilot_passed": "この実行は、同じ recipe (設定) と画像による合格済みの pilot {run} (MLflow run) に続くものです。",
    "full_text": "pilot は画像の {images} と sample (生成画像) の {samples} を使いました。時間は比例すると見なします: "
    "学習とデータ作成は画像数、evaluation (評価) は sample 数、safety (安全性) は両方に比例し、取り込んだモデルは"
    "変わりません。起動時間も比例させているので、合計はやや大きめです。",
    "full_unknown": "見積もれません: 所要時間の記録がない stage (工程) があります。",
    "full_hours": "約 {hours} device-hours (装置時間)。金額は cost.price_per_device_hour を設定すると出ます。",
    "full_money": "約 {hours} device-hours (装置時間)、recipe (設定) の単価で {cost}。",
    "full_advice": "画像が増えると base (元のモデル)、tokenizer、特徴量の network はより多くを学び、distance (距離) は"
    "小さくなります。引き継がれるのは sampler どうしの比較です。",
    "full_start": "--profile full で開始します。",
    "all_stages": "全体 (順に実行)",
    "column_stage": "stage (工程)",
    "column_pilot": "pilot (試行)",
    "column_full": "full run (本実行)",
    "column_devices": "装置数",
    "unit_money": "(recipe (設定) の単価による)",
    "unit_device-hours": "device-hours (装置時間)",
    "section_quality_cost": "品質と費用",
    "quality_cost_text": "測定したすべての sampler (生成方法)。aligned (整合済み) が CFG と同じ品質の高さで、より左 "
    "(低費用) にあるほど良い結果です。CFG は classifier-free guidance (CFG, 分類器なしガイダンス) の略です。",
    "picture_quality_cost": "distance (距離、小さいほど良い) と class consistency (クラス一致率、大きいほど良い) を、"
    "1,000 枚の費用 (画像の復号まで) に対して示します。図中の語は英語で、T は temperature (温度) です。",
    "picture_fidelity_diversity": "忠実度と多様性: recall (再現率) に対する class consistency (クラス一致率) と "
    "distance (距離)。",
    "interval": "{low} から {high}",
    "section_evaluation": "評価",
    "evaluation_text": "平均値と、その下に平均値の 95 % 区間。",
    "column_sampler": "sampler (生成方法)",
    "metric_distance": "distance (距離)",
    "metric_spatial_distance": "spatial distance (空間特徴の距離)",
    "metric_inception_score": "inception score (IS)",
    "metric_precision": "precision (適合率)",
    "metric_recall": "recall (再現率)",
    "metric_density": "density (密度)",
    "metric_coverage": "coverage (被覆率)",
    "metric_class_consistency": "class consistency (クラス一致率)",
    "column_calls": "model call (呼び出し) / 枚",
    "column_speed": "枚 / 秒",
    "column_joules": "joules/image (1 枚あたりの電力量)",
    "column_cost_money": "1,000 枚の費用",
    "column_cost_device-hours": "1,000 枚の device-hours (装置時間)",
    "section_gate": "gate (合否判定)",
    "column_rule": "項目",
    "column_value": "値",
    "column_limit": "基準",
    "column_passed": "合格",
    "column_remedy": "対処",
    "at_least": "{limit} 以上",
    "at_most": "{limit} 以下",
    "yes": "合格",
    "no": "不合格",
    "left_out_no_recall": "多様性の項目はありません。公開されている実画像の統計には画像が含まれず、recall (再現率) "
    "を測定できないためです。多様性を失ったモデルも合格しうるので、生成画像を確認するか、実画像を与えてください",
    "section_costs": "費用",
    "costs_money": "cost.price_per_device_hour の通貨。単価は device-hour (装置時間) あたり {price}。",
    "costs_device-hours": "単位は device-hours (装置時間)。金額で表すには cost.price_per_device_hour "
    "を設定してください。",
    "column_1000": "1,000 枚",
    "column_aligned": "aligned (整合済み)",
    "column_saved": "削減",
    "row_end_to_end": "end to end (画像の復号まで)",
    "row_tokens": "token (トークン) の生成のみ",
    "alignment_unknown": "alignment (整合学習) に要した時間は不明です。stage (工程) が実行記録のないまま storage "
    "(保存先) から引き継がれました。",
    "alignment_took": "alignment (整合学習) に {hours} device-hours (装置時間) を要しました (reference (参照値) "
    "の保存と学習)。",
    "alignment_money": "この単価での費用は {cost} です。",
    "break_even": "{images} 枚で元が取れます (画像の復号まで)。",
    "break_even_never": "aligned model (整合済みモデル) はここでは速くないため、元は取れません。",
    "column_monthly": "月あたりの枚数 ({months} か月)",
    "column_aligned_total": "aligned (整合学習の費用を含む)",
    "section_safety": "safety (安全性)",
    "column_within_class_diversity": "最も単調なクラスの多様性",
    "column_twins": "ほぼ同一の生成画像の割合",
    "column_memorisation": "memorisation (学習画像の記憶)",
    "column_class_disparity": "最悪のクラスと平均の差",
    "column_leakage": "最も混同されたクラス",
    "column_filtered": "content filter (内容フィルタ) が遮断した割合",
    "column_filtered_in_class": "遮断が最も多いクラス",
    "taken_as": "{drawn} → {taken}",
    "safety_text": "aligned (整合済み) を base (元のモデル) と最良の CFG に並べて、同じ枚数の生成画像で測定した値。",
    "section_worst": "aligned model (整合済みモデル) の最悪例",
    "picture_copies.png": "上から: held-out (未学習) のどの画像よりも学習画像に近い生成画像、その学習画像、最も近い "
    "held-out (未学習) 画像。",
    "picture_twins.png": "上から: 互いに最も似ている生成画像、その相手。",
    "picture_least_varied.png": "上から: 実画像に比べて最も単調なクラスの生成画像、そのクラスの実画像。",
    "picture_worst_class.png": "class consistency (クラス一致率) が最も低いクラス。"
    "別のクラスと判定された生成画像が先です。",
    "picture_filtered.png": "上から: content filter (内容フィルタ) の値が最も高い生成画像、"
    "遮断が最も多いクラスの生成画像。",
    "section_votes": "人による評価",
    "votes_text": "どちらの画像かを伏せた比較で {pairs} 組、{reviewers} 人、{votes} 票。{guided} に対する win rate "
    "(勝率) は {rate}、95 % Wilson 区間は {low} から {high} です。",
    "votes_agreement": "{compared} 件の比較のうち {share} で評価者の選択が一致しました。Cohen's kappa (一致係数) は "
    "{kappa} です。",
    "votes_no_agreement": "同じ組に投票した評価者が 2 人いないため、一致の程度は分かりません。",
    "column_class": "クラス",
    "column_wins": "aligned (整合済み) が良い",
    "column_losses": "CFG が良い",
    "column_equal": "同等",
    "column_rate": "win rate (勝率)",
    "all_classes": "全体",
    "section_sweep": "sweep (設定探索)",
    "sweep_text": "候補は {rank} 位の設定です: {label}。",
    "column_rank": "順位",
    "column_settings": "設定",
    "own_settings": "{label} (recipe (設定) の値)",
    "column_guided_distance": "CFG ありの distance (距離)",
    "section_samples": "生成画像",
    "picture_samples": "同じクラスと seed (乱数の種) の画像を生成方法ごとに並べます。一番上は実画像、"
    "その下は同じ画像を符号化して復号したものです。",
    "section_lineage": "lineage (来歴)",
    "column_what": "内容",
    "lineage_source": "source (入力画像)",
    "lineage_tokens": "tokens (トークン)",
    "lineage_stage": "{stage} の digest (要約値)",
    "lineage_version": "model version (モデルの版, {role})",
    "lineage_run": "MLflow run (実行)",
    "lineage_recipe": "recipe (設定)",
    "lineage_package": "package (パッケージ)",
    "embedded_digits": "内蔵の手書き数字 (scikit-learn)",
    "section_measured": "測定方法",
    "measured_samples": "sampler (生成方法) と seed (乱数の種) ごとに {samples} 枚、seed は {seeds}。値は seed "
    "についての平均です。",
    "measured_real": "実画像は {count} 枚 ({real})。",
    "measured_statistics": "実画像の統計は公開されているものです ({real})。",
    "real_published": "公開: {name}",
    "real_images": "evaluate.real={real} の画像",
    "real_codes": "evaluate.real={real}、記録された code (符号) からの再構成",
    "measured_embedded": "distance (距離) は、内蔵の classifier (分類器) の特徴における Frechet distance "
    "(フレシェ距離) です。この実行の中での比較に使うもので、FID ではありません。",
    "measured_file": "distance (距離) は、{name} (sha256 {sha256}) の特徴における Frechet distance (フレシェ距離) "
    "です。同じネットワークで測定したものどうしの比較に使うもので、FID ではありません。",
    "measured_fid": "distance (距離) は Frechet inception distance (FID) です。特徴ネットワークは {name} (sha256 "
    "{sha256}) です。",
    "measured_intervals": "95 % 区間は、画像のまとまりについての bootstrap (ブートストラップ) によります。recall "
    "(再現率) と coverage (被覆率) では実画像を、他では生成画像を引き直します。"
    "引き直しで値がどれだけ動くかを示すもので、この枚数での distance (距離) の偏りは含みません。",
    "measured_cost": "速度は 1 台の装置で、sampler (生成方法) ごとに {images} 枚、batch size (一括枚数) {batch}、3 "
    "回の中央値です。base、最良の CFG、aligned は 1 回の実行で、他は別の実行で測定しました。",
    "section_reproduce": "再現方法",
    "reproduce_text": "すべての値を記した recipe (設定) は MLflow run (実行) の artifact (成果物) で、report.html "
    "にもあります。同じ storage (保存先)、入力、checkpoint (重み) があれば全工程が完了済みと判定され、"
    "別の場所では計算し直されます:",
    "note_rest": "続きは artifact (成果物) の report.html と report.md にあります。",
    "reproduce_recipe": "すべての値を記した recipe (recipe.yaml)",
    "rule_distance_vs_base": "guidance (ガイダンス) なしの base (元のモデル) に対する distance (距離) の比",
    "remedy_distance_vs_base": "align.epochs か align.lambda_ を上げる、または base の学習を長くする",
    "rule_distance_vs_best_cfg": "{guided} に対する distance (距離) の比",
    "remedy_distance_vs_best_cfg": "align.beta と align.lambda_ を 0.3 から 10 の範囲で試す",
    "rule_class_drop": "最悪のクラスが失った class consistency (クラス一致率)",
    "remedy_class_drop": "そのクラスの画像を確認する: ラベルの誤り、または枚数の不足",
    "rule_recall_share": "{guided} に対する recall (再現率) の比",
    "remedy_recall_share": "align.lambda_ か align.epochs を下げる: モデルが多様性を失っています",
    "rule_beat_temperature": "同じ recall (再現率) になる base の temperature (温度) の class consistency "
    "(クラス一致率) を上回ること",
    "remedy_beat_temperature": "temperature (温度) を下げるだけで同等です: align.lambda_ か align.epochs を上げる",
    "rule_distance_vs_champion": "現在の champion (現行モデル) に対する distance (距離) の比",
    "remedy_distance_vs_champion": "champion (現行モデル) の方が良いので、継続する",
    "rule_win_rate": "人による win rate (勝率) ({votes} 票、95 % 区間 {low:.3f} から {high:.3f})",
    "remedy_win_rate": "人は guidance (ガイダンス) ありを好みます: 負けているクラスを確認し、align.lambda_ か "
    "align.epochs を上げる",
    "rule_safety_variety": "最も単調なクラス {class_name} の、実画像に対する多様性",
    "remedy_safety_variety": "そのクラスが少数の画像に collapse (縮退) しています: align.lambda_、align.epochs、"
    "align.optim.lr を下げる",
    "rule_safety_twins": "他とほぼ同一の生成画像の割合",
    "remedy_safety_twins": "同じ画像を繰り返しています: align.lambda_ か align.epochs を下げる",
    "rule_safety_memorisation": "memorisation (学習画像の記憶): 生成画像の最近傍が偶然よりどれだけ多く学習画像か (0 "
    "は偶然と同じ)",
    "remedy_safety_memorisation": "学習画像を写しています (copies.png): 学習画像を増やすか、epochs を減らす",
    "rule_safety_disparity": "最悪のクラス {class_name} の class consistency (クラス一致率) と平均の差",
    "remedy_safety_disparity": "そのクラスの画像を確認する (worst_class.png): ラベルの誤り、または枚数の不足",
    "rule_safety_filter": "遮断が最も多いクラス {class_name} のうち content filter (内容フィルタ) が遮断した割合",
    "remedy_safety_filter": "遮断された画像を確認する (filtered.png): そのクラスの該当画像を source (入力) から除く。"
    "フィルタの誤りなら safety.filter_threshold を上げる",
    "rule_safety_leakage": "最も混同されたクラス: {drawn} のうち {taken} と判定された割合",
    "remedy_safety_leakage": "一方の画像に他方のラベルが付いていないか確認する。alignment (整合学習) だけが弱いなら "
    "align.lambda_ を上げる",
}
