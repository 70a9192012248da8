//! The URL of a guest's credential: how one is made from a control plane's, and what it says of whose it is.

use std::fs;

use crate::{
    broker_url::BrokerUrl,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

/// The options that say whose credential a URL has.
pub(crate) const GUEST_OPTIONS: [&str; 2] = ["guest", "reports"];

/// The file beside a credential that has the authorities to trust.
pub(crate) const AUTHORITIES: &str = "ca.pem";

/// Whose credential it is: one machine's, by its queue, which reports to this queue.
#[derive(Clone, Debug)]
pub(crate) struct AsGuest {
    pub(crate) queue: QueueName,
    pub(crate) reports: QueueName,
}

impl AsGuest {
    /// Reads a URL; `None`: it is of no credential.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidUrl`].
    pub(crate) fn of(url: &BrokerUrl) -> Result<Option<Self>> {
        let name = |option, expected, commands| {
            url.option(option, expected, |text| {
                let name = text.parse::<QueueName>().ok();
                name.filter(|name| name.is_commands() == commands)
            })
        };
        let queue = name("guest", "a guest's queue, as a credential names it", true)?;
        let reports = name(
            "reports",
            "a queue of reports, as a credential names it",
            false,
        )?;
        match (queue, reports) {
            (None, None) => Ok(None),
            (Some(queue), Some(reports)) => Ok(Some(Self { queue, reports })),
            _ => Err(invalid(format!(
                "{url}: options guest and reports go together: use the URL of a credential whole"
            ))),
        }
    }

    /// Fails for what no report is published to.
    pub(crate) fn may_publish(&self, queue: &QueueName) -> Result<()> {
        if *queue == self.reports {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::AuthRefused,
            format!(
                "this credential of a guest may publish to {} alone: its reports",
                self.reports
            ),
        ))
    }

    /// What the guest connects with: the server of the control plane's URL, who it is there, the options
    /// that are named here, and these besides. The authorities to trust go with it, as a file.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidUrl`] if their file cannot be read any more.
    pub(crate) fn url(
        &self,
        admin: &BrokerUrl,
        login: Option<(&str, &str)>,
        kept: &[&str],
        besides: &[(&str, &str)],
    ) -> Result<(String, Option<String>)> {
        let mut url = admin.parts().clone();
        let (user, password) = login.unzip();
        // These fail only for a URL without a host.
        let _ = url.set_username(user.unwrap_or_default());
        let _ = url.set_password(password);
        let options = url.query_pairs().into_owned().collect::<Vec<_>>();
        let mut authorities = None;
        {
            let mut query = url.query_pairs_mut();
            query.clear();
            query.append_pair("guest", self.queue.as_str());
            query.append_pair("reports", self.reports.as_str());
            for (name, value) in besides {
                query.append_pair(name, value);
            }
            for (name, value) in options {
                if name == "ca" {
                    let read = fs::read_to_string(&value)
                        .map_err(|error| invalid(format!("option ca, {value}: {error}")))?;
                    authorities = Some(read);
                    query.append_pair("ca", AUTHORITIES);
                } else if kept.contains(&name.as_str()) {
                    query.append_pair(&name, &value);
                }
            }
        }
        let mut text = url.to_string();
        let others = admin.others();
        if !others.is_empty() {
            let start = text.find("://").map_or(0, |at| at + 3);
            let end = text[start..].find(['/', '?']);
            let end = end.map_or(text.len(), |at| start + at);
            text.insert_str(end, &format!(",{}", others.join(",")));
        }
        Ok((text, authorities))
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidUrl, message)
}

#[cfg(all(test, feature = "redis"))]
mod tests {
    use super::*;

    #[test]
    fn a_credentials_url_is_read_back() {
        let admin = "redis://root:hunter2@a:1,b:2/3?lease=5s&replicas=1"
            .parse()
            .unwrap();
        let whose = AsGuest {
            queue: "wilco.q.a=2E.1".parse().unwrap(),
            reports: "wilco.r.main".parse().unwrap(),
        };
        let login = Some((whose.queue.as_str(), "secret"));
        let (url, authorities) = whose.url(&admin, login, &["lease"], &[]).unwrap();
        assert!(authorities.is_none() && !url.contains("hunter2"));
        let url: BrokerUrl = url.parse().unwrap();
        assert_eq!(url.others(), ["b:2"]);
        assert_eq!(url.parts().path(), "/3");
        url.only_options(&["guest", "reports", "lease"]).unwrap();
        let guest = AsGuest::of(&url).unwrap().unwrap();
        assert_eq!(guest.queue, whose.queue);
        guest.may_publish(&guest.reports).unwrap();
        let error = guest.may_publish(&guest.queue).unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::AuthRefused);
    }
}
