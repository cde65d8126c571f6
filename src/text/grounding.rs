//! Boxes that a model is asked for or answers with, in Qwen-VL's notation.
//!
//! Coordinates are integers in `0..1000` relative to width and height: `<ref>phrase</ref><box>(x1,y1),(x2,y2)</box>`.

use super::qwen::{Element, QwenTokenizer, tags};
use crate::error::{Error, Kind, Result};

/// Coordinates are relative to this.
pub const SCALE: i32 = 1000;

/// A rectangle with the phrase that names what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroundedBox {
    /// Left, top, right, bottom.
    pub corners: [i32; 4],
    /// Phrase directly before the box.
    pub phrase: Option<String>,
}

impl GroundedBox {
    /// `<ref>phrase</ref><box>(x1,y1),(x2,y2)</box>`.
    ///
    /// # Errors
    /// A coordinate outside `0..=999`, or corners in the wrong order.
    pub fn tagged(&self) -> Result<String> {
        self.check()?;
        let [x1, y1, x2, y2] = self.corners;
        let phrase = self.phrase.as_ref().map_or_else(String::new, |p| format!("<ref>{p}</ref>"));
        Ok(format!("{phrase}<box>({x1},{y1}),({x2},{y2})</box>"))
    }

    /// Refuses coordinates that no image has.
    ///
    /// # Errors
    /// A coordinate outside `0..=999`, or corners in the wrong order.
    pub fn check(&self) -> Result<()> {
        let [x1, y1, x2, y2] = self.corners;
        if self.corners.iter().any(|c| !(0..SCALE).contains(c)) || x1 > x2 || y1 > y2 {
            return Err(Error::new(Kind::Data, "bad box")
                .expected("0..=999, first corner at the top left")
                .found(format!("({x1},{y1}),({x2},{y2})"))
                .help("coordinates are thousandths of the image's width and height"));
        }
        Ok(())
    }

    /// Corners in pixels of an image, rounded towards zero as in the original.
    #[must_use]
    pub fn pixels(&self, width: usize, height: usize) -> [i32; 4] {
        let scaled = |value: i32, size: usize| (f64::from(value) / f64::from(SCALE) * size as f64) as i32;
        let [x1, y1, x2, y2] = self.corners;
        [scaled(x1, width), scaled(y1, height), scaled(x2, width), scaled(y2, height)]
    }
}

/// All boxes of a text, in order. A phrase belongs to the box that directly follows it.
///
/// # Errors
/// Tags that are not closed, or a box that is not four integers. The range of the coordinates is not checked, see
/// [`GroundedBox::check`].
pub fn boxes(t: &QwenTokenizer, text: &str) -> Result<Vec<GroundedBox>> {
    let elements = t.elements(text)?;
    let mut found = Vec::new();
    for (i, element) in elements.iter().enumerate() {
        let Element::Box(inner) = element else { continue };
        let phrase = match i.checked_sub(1).map(|before| &elements[before]) {
            Some(Element::Ref(phrase)) => Some(phrase.trim().to_string()),
            _ => None,
        };
        found.push(GroundedBox { corners: corners(inner)?, phrase });
    }
    Ok(found)
}

/// Refuses boxes and quadrilaterals in `text` that no image has.
///
/// # Errors
/// Tags that are not closed, coordinates that are not integers in `0..=999`, or a box whose corners are swapped.
pub fn check(text: &str) -> Result<()> {
    for element in tags(text)? {
        match element {
            Element::Box(inner) => GroundedBox { corners: corners(&inner)?, phrase: None }.check()?,
            Element::Quad(inner) => {
                let inside = integers(&inner).is_some_and(|n| n.len() == 8 && n.iter().all(|c| (0..SCALE).contains(c)));
                if !inside {
                    return Err(Error::new(Kind::Data, "bad quadrilateral")
                        .expected("four corners in 0..=999: (x1,y1),(x2,y2),(x3,y3),(x4,y4)")
                        .found(inner));
                }
            }
            Element::Text(_) | Element::Image(_) | Element::Ref(_) => {}
        }
    }
    Ok(())
}

fn integers(inner: &str) -> Option<Vec<i32>> {
    inner.replace(['(', ')'], "").split(',').map(|n| n.trim().parse().ok()).collect()
}

fn corners(inner: &str) -> Result<[i32; 4]> {
    integers(inner)
        .and_then(|n| n.try_into().ok())
        .ok_or_else(|| Error::new(Kind::Text, "a box is not four integers").expected("(x1,y1),(x2,y2)").found(inner))
}

#[cfg(test)]
mod tests {
    use super::{super::qwen::tests::bytes_only, *};

    #[test]
    fn a_phrase_belongs_to_the_box_right_after_it() {
        let text = "<ref> dog </ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>";
        let found = boxes(&bytes_only(), text).unwrap();
        assert_eq!(found[0], GroundedBox { corners: [1, 2, 3, 4], phrase: Some("dog".into()) });
        assert_eq!(found[1].phrase, None);
        assert_eq!(found[0].tagged().unwrap(), "<ref>dog</ref><box>(1,2),(3,4)</box>");
        assert!(boxes(&bytes_only(), "<box>(1,2)</box>").is_err());
    }

    #[test]
    fn coordinates_are_thousandths() {
        let whole = GroundedBox { corners: [0, 0, 999, 500], phrase: None };
        assert_eq!(whole.pixels(448, 200), [0, 0, 447, 100]);
        let outside = GroundedBox { corners: [0, 0, 1000, 500], phrase: None };
        assert!(outside.tagged().unwrap_err().to_string().contains("0..=999"));
        assert!(GroundedBox { corners: [9, 0, 1, 5], phrase: None }.check().is_err());
        assert!(check("<quad>(1,2),(3,4),(5,6),(7,8)</quad> and <box>(0,0),(9,9)</box>").is_ok());
        assert!(check("<quad>(1,2),(3,4),(5,6)</quad>").is_err() && check("<box>(0,0),(9,1000)</box>").is_err());
    }
}
