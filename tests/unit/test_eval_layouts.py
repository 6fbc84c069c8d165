"""Public evaluation sets, in small folders laid out as the sets are documented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from catalens.domain import Product
from catalens.errors import CatalensError
from catalens_standalone.cli_eval import Layout
from catalens_standalone.eval_layouts import LAYOUTS, Converted, convert
from catalens_standalone.evaluating import Query


def put(folder: Path, name: str, content: object) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def read(layout: str, folder: Path) -> tuple[dict[str, dict[str, Any]], list[Query]]:
    """Convert, and see that `catalens import` and `catalens eval` would take what comes out."""
    found: Converted = convert(layout, folder)
    for product in found.products.values():
        Product.model_validate({key: value for key, value in product.items() if key != "images"})
        assert all(isinstance(picture, str) for picture in product["images"])
    return found.products, [Query.model_validate(query) for query in found.queries]


def test_the_command_names_every_layout() -> None:
    assert [one.value for one in Layout] == list(LAYOUTS)


def test_marqo_gs(tmp_path: Path) -> None:
    put(
        tmp_path,
        "query_0_product_id_0.csv",
        "image_local,query,product_id,position,title,pair_id,score_linear,score_reciprocal,no_score,query_id\n"
        'images_wfash/1.webp,womens boots,111,1,"Boots, black",q-111,100,1.0,1,7\n'
        "images_wfash/2.webp,womens boots,222,2,Brown Boots,q-222,99,0.5,1,7\n",
    )
    put(
        tmp_path,
        "query_1_product_id_1.csv",
        "image,query,product_id,position,title\nhttps://shop.example/3.jpg,rain hat,333,4,Rain Hat\n",
    )
    products, queries = read("marqo-gs", tmp_path)
    assert products["111"] == {
        "product_id": "111",
        "name": "Boots, black",
        "images": [str(tmp_path / "images_wfash/1.webp")],
    }
    assert products["333"]["images"] == ["https://shop.example/3.jpg"]
    assert [(one.query, one.kind, dict(one.relevant)) for one in queries] == [
        ("womens boots", "in domain", {"111": 100, "222": 99}),
        ("rain hat", "zero shot", {"333": 97}),
    ]


def test_fashion200k(tmp_path: Path) -> None:
    put(
        tmp_path,
        "labels/dress_test_detect_all.txt",
        "women/dresses/casual/1/1_0.jpeg\t0.99\tblack lace dress\n"
        "women/dresses/casual/1/1_1.jpeg\t0.71\tblack lace dress\n"
        "women/dresses/casual/2/2_0.jpeg\t0.88\tred lace dress\n"
        "women/dresses/casual/3/3_0.jpeg\t0.64\tred lace dress\n",
    )
    put(tmp_path, "labels/dress_train_detect_all.txt", "women/dresses/casual/9/9_0.jpeg\t0.9\tblue dress\n")
    put(tmp_path, "test_queries.txt", "women/dresses/casual/1/1_0.jpeg women/dresses/casual/2/2_0.jpeg\n")
    products, queries = read("fashion200k", tmp_path)
    assert sorted(products) == ["1", "2", "3"]
    assert products["1"] == {
        "product_id": "1",
        "name": "black lace dress",
        "category": "dress",
        "images": [str(tmp_path / f"women/dresses/casual/1/1_{number}.jpeg") for number in (0, 1)],
    }
    assert {one.query: dict(one.relevant) for one in queries if one.kind == "description"} == {
        "black lace dress": {"1": 1},
        "red lace dress": {"2": 1, "3": 1},
    }
    (composed,) = (one for one in queries if one.kind == "picture and words")
    assert composed.query == "replace black with red"
    assert composed.image == str(tmp_path / "women/dresses/casual/1/1_0.jpeg")
    assert composed.relevant == {"2": 1, "3": 1}


def test_deepfashion_inshop(tmp_path: Path) -> None:
    put(
        tmp_path,
        "Eval/list_eval_partition.txt",
        "4\nimage_name item_id evaluation_status\n"
        "img/WOMEN/Dresses/id_00000002/02_1_front.jpg             id_00000002 train\n"
        "img/WOMEN/Tees_Tanks/id_00000080/01_1_front.jpg          id_00000080 query\n"
        "img/WOMEN/Tees_Tanks/id_00000080/01_2_side.jpg           id_00000080 gallery\n"
        "img/WOMEN/Tees_Tanks/id_00000080/01_3_back.jpg           id_00000080 gallery\n",
    )
    put(
        tmp_path,
        "Anno/list_description_inshop.json",
        [{"item": "id_00000080", "color": "Cream", "description": ["A loose tee.", "100% cotton"]}],
    )
    products, queries = read("deepfashion-inshop", tmp_path)
    folder = tmp_path / "Img/img/WOMEN/Tees_Tanks/id_00000080"
    assert products == {
        "id_00000080": {
            "product_id": "id_00000080",
            "name": "Cream Tees Tanks",
            "category": "Tees Tanks",
            "description": "A loose tee.\n100% cotton",
            "images": [str(folder / "01_2_side.jpg"), str(folder / "01_3_back.jpg")],
        }
    }
    (query,) = queries
    assert (query.query, query.image) == (None, str(folder / "01_1_front.jpg"))
    assert query.relevant == {"id_00000080": 1}


def test_fashion_iq(tmp_path: Path) -> None:
    put(tmp_path, "image_splits/split.dress.val.json", ["B003FGW7MK", "B008BHCT58"])
    put(
        tmp_path,
        "captions/cap.dress.val.json",
        [
            {
                "target": "B008BHCT58",
                "candidate": "B003FGW7MK",
                "captions": ["is solid black with no sleeves", "is black with straps."],
            }
        ],
    )
    put(tmp_path, "images/B003FGW7MK.png", "")
    products, queries = read("fashion-iq", tmp_path)
    assert products["B003FGW7MK"]["images"] == [str(tmp_path / "images/B003FGW7MK.png")]
    assert products["B008BHCT58"]["images"] == [str(tmp_path / "images/B008BHCT58.jpg")]
    (query,) = queries
    assert query.query == "is solid black with no sleeves and is black with straps"
    assert (query.image, query.kind) == (str(tmp_path / "images/B003FGW7MK.png"), "dress")
    assert query.relevant == {"B008BHCT58": 1}


ESCI_EXAMPLES = (
    "example_id,query,query_id,product_id,product_locale,esci_label,small_version,large_version,split\n"
    "1,crib sheets,11,B07A,us,E,1,1,test\n"
    "2,crib sheets,11,B07B,us,S,1,1,test\n"
    "3,crib sheets,11,B07C,us,I,1,1,test\n"
    "4,sillas,12,B07D,es,E,1,1,test\n"
    "5,other,13,B07E,us,E,0,1,test\n"
    "6,other,14,B07F,us,E,1,1,train\n"
)
ESCI_PRODUCTS = (
    "product_id,product_title,product_description,product_bullet_point,product_brand,product_color,product_locale\n"
    "B07A,Crib Sheet,Soft.,Fits all,Acme,White,us\n"
    "B07B,Sheet,,,,,us\n"
    "B07C,Car,,,,,us\n"
    "B07D,Silla,,,,,es\n"
    "B07E,Unjudged,,,,,us\n"
)


def check_esci(folder: Path) -> None:
    products, queries = read("esci", folder)
    assert sorted(products) == ["es:B07D", "us:B07A", "us:B07B", "us:B07C"]
    assert products["us:B07A"] == {
        "product_id": "us:B07A",
        "name": "Crib Sheet",
        "description": "Soft.\nFits all",
        "brand": "Acme",
        "locale": "en",
        "attributes": {"color": "White"},
        "images": ["https://pictures.example/a.jpg"],
    }
    assert products["us:B07B"]["images"] == []
    assert [(one.query, one.language, dict(one.relevant)) for one in queries] == [
        ("crib sheets", "en", {"us:B07A": 1, "us:B07B": 0.1, "us:B07C": 0}),
        ("sillas", "es", {"es:B07D": 1}),
    ]


def test_esci_from_csv_with_the_pictures_of_sqid(tmp_path: Path) -> None:
    base = "shopping_queries_dataset/shopping_queries_dataset_"
    put(tmp_path, f"{base}examples.csv", ESCI_EXAMPLES)
    put(tmp_path, f"{base}products.csv", ESCI_PRODUCTS)
    put(tmp_path, "sqid/product_image_urls.csv", "product_id,image_url\nB07A,https://pictures.example/a.jpg\nB07B,\n")
    check_esci(tmp_path)


def test_esci_from_json_lines(tmp_path: Path) -> None:
    for name, table in (("examples", ESCI_EXAMPLES), ("products", ESCI_PRODUCTS)):
        header, *rows = (row.split(",") for row in table.splitlines())
        lines = [json.dumps(dict(zip(header, row, strict=True))) for row in rows]
        put(tmp_path, f"shopping_queries_dataset_{name}.jsonl", "\n".join(lines))
    put(tmp_path, "sqid/product_image_urls.csv", "product_id,image_url\nB07A,https://pictures.example/a.jpg\n")
    check_esci(tmp_path)


def test_parquet_is_to_be_turned_into_csv(tmp_path: Path) -> None:
    put(tmp_path, "shopping_queries_dataset_examples.parquet", "")
    with pytest.raises(CatalensError, match=r"into \.csv or \.jsonl first"):
        convert("esci", tmp_path)


@pytest.mark.parametrize(
    ("layout", "files", "said"),
    [
        ("marqo-gs", {}, "no query_"),
        ("marqo-gs", {"query_0_product_id_0.csv": "query,title\n"}, "no column product_id, position"),
        ("marqo-gs", {"query_0_product_id_0.csv": "query,product_id,position,title\na,1,first,b\n"}, "no number"),
        ("fashion200k", {}, "labels"),
        ("fashion200k", {"labels/top_test_detect_all.txt": "a.jpg 0.5 red top\n"}, "line 1"),
        (
            "fashion200k",
            {"labels/top_test_detect_all.txt": "w/1/a.jpg\t0.5\tred top\n", "test_queries.txt": "w/1/a.jpg w/2/b.jpg"},
            "test_queries.txt: line 1",
        ),
        ("deepfashion-inshop", {}, "list_eval_partition"),
        ("deepfashion-inshop", {"Eval/list_eval_partition.txt": "1\na b c\n"}, "second line"),
        ("fashion-iq", {}, "0 products"),
        ("fashion-iq", {"captions/cap.dress.val.json": [{}], "image_splits/split.dress.val.json": ["B1"]}, "entry 1"),
        ("fashion-iq", {"captions/cap.dress.val.json": [], "image_splits/split.dress.val.json": {}}, "not a JSON list"),
        ("esci", {}, "no shopping_queries_dataset_examples"),
        ("esci", {"shopping_queries_dataset_examples.csv": "query,query_id\na,1\n"}, "no column product_id"),
        ("esci", {"shopping_queries_dataset_examples.jsonl": "{}\n"}, "no column query_id"),
        (
            "esci",
            {"shopping_queries_dataset_examples.csv": ESCI_EXAMPLES.replace("us,E", "us,X")},
            "'X' is none of",
        ),
    ],
)
def test_what_is_not_laid_out_so_is_named(tmp_path: Path, layout: str, files: dict[str, object], said: str) -> None:
    for name, content in files.items():
        put(tmp_path, name, content)
    with pytest.raises(CatalensError, match=said):
        convert(layout, tmp_path)
